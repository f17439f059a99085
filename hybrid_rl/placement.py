"""The components of a model by name, and placements: which of them may be candidates. Imports nothing."""

from __future__ import annotations

PLACEMENTS = {
    "all": "attention+recurrent+mlp+expert",
    # The six conditions a model of arXiv 2604.22127 (repository at 2522b6d, results/discovery), exactly: first its
    # sequential hybrid, then its parallel one, whose single conditions leave some of the eligible matrices out.
    "softmax_only": "attention",
    "gdn_only": "recurrent",
    "mlp_only": "mlp",
    "softmax_plus_mlp": "attention+mlp",
    "gdn_plus_mlp": "recurrent+mlp",
    "all_layers": "attention+recurrent+mlp",
    "attention_only": "attention:q_proj|k_proj|v_proj",
    "ssm_only": "recurrent:in_proj",
    "attention_plus_mlp": "attention:q_proj|k_proj|v_proj+mlp",
    "ssm_plus_mlp": "recurrent:in_proj+mlp",
    "all_eligible": "attention+recurrent:in_proj+mlp+lm_head",
}
"""Named placements, and what each stands for."""
PLACEABLE = ("attention", "recurrent", "mlp", "expert", "lm_head")
COMPONENTS = (*PLACEABLE, "router", "embedding", "norm", "other")
