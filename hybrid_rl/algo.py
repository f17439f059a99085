"""Settings of policy optimisation, and the presets: what a paper's name stands for. The functions that the names choose
are in `hybrid_rl/algorithms/`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hybrid_rl.settings import NotNegative, Positive, Probability, Settings


class AlgoConfig(Settings):
    """Formulas: `hybrid_rl/algorithms/`. Defaults are the preset `grpo`'s; a preset's own are in `PRESETS`."""

    advantage: str = "group_normalised"
    """Rewards to advantages: `group_normalised`, `group_centred`, `batch_normalised`, `rloo`, `reinforce_pp_baseline`,
    `raw`, or your own as `module:function`."""
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Of several rewards (TRL's names): the advantage is of their weighted sum; or each is normalised within its group,
    then they are summed by weight and normalised over the batch (GDPO, arXiv 2601.05242)."""
    loss: str = "clip"
    """Loss of a token: `clip` (PPO, GRPO), `gspo` (one ratio a sequence), `gspo_token`, `cispo`, `sapo`, or your own as
    `module:function`."""
    clip_low: Probability = 0.2
    """Lower clip of the importance ratio: 1 - clip_low."""
    clip_high: Positive = 0.2
    """Upper clip of the importance ratio: 1 + clip_high. Of `cispo`, the cap of its weight."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Cap of the ratio where the advantage is negative (dual-clip PPO); none by default."""
    sapo_temperature_positive: Positive = 1.0
    """Sharpness of SAPO's soft gate where the advantage is positive."""
    sapo_temperature_negative: Positive = 1.05
    """The same where it is negative."""
    aggregation: Literal["sequence_mean_token_mean", "token_mean", "sequence_mean_token_sum", "constant_length"] = (
        "sequence_mean_token_mean"
    )
    """How token losses become one number: mean over sequences of each one's mean; mean over the mini-batch's tokens;
    mean over sequences of each one's sum; the same divided by `sampling.max_completion_length`."""
    kl_coef: NotNegative = 0.0
    """Weight of the KL divergence from the base model. 0 needs no reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of it on the sampled tokens (Schulman, "Approximating KL divergence")."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Add it to each token's loss, or take its sum over a completion from that completion's reward."""
    entropy_coef: NotNegative = 0.0
    """Weight of the policy's entropy, which is taken from the loss. 0: entropy is measured only."""
    old_logprobs: Literal["learner", "rollout"] = "learner"
    """Whose log-probabilities the ratio is against: the learner's at the weights that sampled, computed apart where the
    first pass does not give them, or the rollout engine's."""
    mismatch: Literal["none", "truncate", "mask"] = "none"
    """Correction for the engine and the learner computing differently, by their ratio at the weights that sampled:
    clamp it to the bounds and weigh with it (TIS), or weigh with it and leave out what lies outside of them (MIS)."""
    mismatch_level: Literal["token", "sequence", "geometric"] = "token"
    """Ratio of each token; of the sequence, as the product of its tokens'; or as their geometric mean."""
    mismatch_min: NotNegative = 0.0
    """Lower bound of that ratio."""
    mismatch_max: Positive = 2.0
    """Upper bound of it."""
    off_policy_mask: Positive | None = None
    """Leave out sequences of negative advantage whose
    mean log(old / new probability) is above this. Off by default."""
    zero_variance: Literal["count", "drop", "resample"] = "count"
    """Groups whose rewards are all equal have no advantage and are not computed, but for penalties, KL and entropy.
    `count`: they count in the means, as in the papers; `drop`: they are left out, the mean is over the rest;
    `resample`: like `drop`, and other prompts are drawn in their place."""
    resample_limit: Annotated[int, Field(ge=1)] = 3
    """Times that `zero_variance=resample` draws again for one step."""
    overlong_filter: bool = False
    """Leave completions that were cut at the length limit out of the loss."""
    overlong_buffer: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last part of the length limit, as a share, over which a penalty of the reward grows linearly (DAPO)."""
    overlong_penalty: NotNegative = 1.0
    """What it grows to."""

    @property
    def needs_reference(self) -> bool:
        """Whether the base policy's log-probabilities are needed."""
        return self.kl_coef > 0

    @property
    def trains_without_advantage(self) -> bool:
        """Whether a completion of advantage 0 has a gradient."""
        return self.entropy_coef > 0 or (self.kl_coef > 0 and self.kl_in == "loss")

    @model_validator(mode="after")
    def _cross_checks(self) -> AlgoConfig:
        if self.mismatch_min >= self.mismatch_max:
            raise ValueError(
                f"algo.mismatch_min={self.mismatch_min} is not below algo.mismatch_max={self.mismatch_max}; nothing "
                "would be trained"
            )
        if self.mismatch != "none" and self.old_logprobs == "rollout":
            raise ValueError(
                f"algo.mismatch={self.mismatch} corrects for what algo.old_logprobs=rollout puts into the ratio; "
                "use one of them"
            )
        if self.advantage == "raw" and self.zero_variance != "count":
            raise ValueError(
                f"algo.zero_variance={self.zero_variance} drops groups of equal rewards, which algo.advantage=raw "
                "learns from; use algo.zero_variance=count"
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"algo.dual_clip={self.dual_clip} must be above 1 + algo.clip_high = {1 + self.clip_high}")
        return self

    def idle(self) -> dict[str, str]:
        """Fields that do nothing, and the field beside which they don't."""
        silent = {
            "kl_coef": (self.kl_coef == 0, ("kl_in", "kl_estimator")),
            "mismatch": (self.mismatch == "none", ("mismatch_level", "mismatch_min", "mismatch_max")),
            "zero_variance": (self.zero_variance != "resample", ("resample_limit",)),
            "overlong_buffer": (self.overlong_buffer == 0, ("overlong_penalty",)),
        }
        names = {name: field for field, (idle, those) in silent.items() if idle for name in those}
        return names | {name: "loss" for name in _IDLE_BESIDE.get(self.loss, ())}


_SAPO = ("sapo_temperature_positive", "sapo_temperature_negative")
_IDLE_BESIDE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("clip", "gspo", "gspo_token"), _SAPO),
    "cispo": ("clip_low", "dual_clip", *_SAPO),
    "sapo": ("clip_low", "clip_high", "dual_clip"),
}
"""Loss -> the fields that it does not look at. A loss of one's own may look at any."""

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath (arXiv 2402.03300) with the KL off, as reinforcement learning with verifiable rewards has it.
    "grpo": {},
    "grpo_deepseekmath": {"kl_coef": 0.04},  # arXiv 2402.03300, section 4.2
    "grpo_r1": {"kl_coef": 0.001, "clip_low": 1.0, "clip_high": 10.0},  # DeepSeek-R1; a clip of 10 never binds below
    # arXiv 2507.18071, section 5.1, where a rollout batch is split into 4 mini-batches (batch.mini_batches=4).
    "gspo": {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    "gspo_token": {"loss": "gspo_token", "clip_low": 3e-4, "clip_high": 4e-4},
    "dr_grpo": {"advantage": "group_centred", "aggregation": "constant_length"},  # arXiv 2503.20783
    # arXiv 2503.14476, section 4.1: a soft zone of 4,096 of 20,480 tokens.
    "dapo": {
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "zero_variance": "resample",
        "overlong_filter": True,
        "overlong_buffer": 0.2,
    },
    "rloo": {"advantage": "rloo", "aggregation": "sequence_mean_token_sum"},  # arXiv 2402.14740
    "reinforce_pp": {"advantage": "reinforce_pp_baseline", "aggregation": "token_mean"},  # arXiv 2501.03262
    # Minimax-M1 (arXiv 2506.13585), with ScaleRL's cap of 5 and its batch-level deviation (arXiv 2510.13786).
    "cispo": {"loss": "cispo", "advantage": "batch_normalised", "aggregation": "token_mean", "clip_high": 4.0},
    "sapo": {"loss": "sapo"},  # arXiv 2511.20347
    "bnpo": {"aggregation": "token_mean"},  # what TRL calls so
    "lite_ppo": {"advantage": "batch_normalised", "aggregation": "token_mean"},  # arXiv 2508.08221
}
"""Preset of `algorithm` -> the fields of `algo` in which it differs from `AlgoConfig`'s defaults."""
