"""Problems: where they come from, what the policy is shown, and in which order."""

from hybrid_rl.data.prompts import PromptSource, build_prompts, load_tokenizer
from hybrid_rl.data.sources import load_rows

__all__ = ["PromptSource", "build_prompts", "load_rows", "load_tokenizer"]
