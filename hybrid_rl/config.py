"""Every setting of a run: one pydantic tree, read from YAML and `key=value` overrides.

Unknown keys are refused with the nearest valid name, settings that contradict each other with both names. Nothing here
imports torch, Ray or vLLM, so a configuration can be checked anywhere in well under a second. Checks that need the
model, the data or the cluster are made by the rooms that own them, and raise the same `ConfigError`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hybrid_rl.algo import PRESETS, AlgoConfig
from hybrid_rl.cross_checks import cross_check
from hybrid_rl.placement import COMPONENTS, PLACEABLE, PLACEMENTS
from hybrid_rl.reward_settings import EvalConfig
from hybrid_rl.reward_settings import RewardConfig as RewardConfig
from hybrid_rl.reward_settings import RewardSpec as RewardSpec
from hybrid_rl.run_settings import CheckpointConfig as CheckpointConfig
from hybrid_rl.run_settings import ClusterConfig, RunConfig, TrackingConfig
from hybrid_rl.settings import ConfigError as ConfigError
from hybrid_rl.settings import NotNegative, Positive, PositiveInt, Probability, Settings
from hybrid_rl.treatments import (
    ADAPTATIONS,
    ADAPTERS,
    ROUTED,
    AdaloraConfig,
    FullConfig,
    LoraConfig,
    MatryoshkaConfig,
    MolfConfig,
    Schedule,
)

_Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Settings):
    path: str
    """A hub name or a local directory holding a causal language model and its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the learner's forward pass and of the rollout engines. Trained weights keep fp32 masters."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless asked for."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of the learner (transformers' name for it)."""


class DataConfig(Settings):
    train: str
    """Training problems: a local `.jsonl`, `.json`, `.parquet` or `.csv` file, a hub data set
    `owner/name[:config][@split]`, or `arithmetic@train`, the built-in generator (`arithmetic:subtraction` or
    `arithmetic:both` for other problems than addition, `arithmetic:words` for stories of both; the splits `validation`
    and `test` are halves of `eval`)."""
    eval: str | Annotated[dict[str, str], Field(min_length=1)]
    """Held-out problems, named as `data.train` is; several sets as `{name: problems, ...}`."""
    columns: dict[str, str] = {}
    """Our name -> the data set's column, e.g. `{prompt: question}`. `prompt` must exist; rewards see all columns."""
    template: str = "{prompt}"
    """Text shown to the policy; `{prompt}` stands for the problem. No other brace is special."""
    chat: bool = False
    """Wrap the text as a user message in the tokenizer's chat template."""
    answer_after: str | None = None
    """Keep of the `answer` column only what follows the last occurrence of this mark (GSM8K: `####`)."""
    max_prompt_length: PositiveInt = 1024
    """Prompts of more tokens are left out, and counted."""
    eval_size: PositiveInt | None = None
    """Use the first so many held-out problems of each set; all of them by default."""

    @model_validator(mode="after")
    def _named(self) -> DataConfig:
        if isinstance(self.eval, dict) and "" in self.eval:
            raise ValueError("data.eval: a set has no name; give it one")
        return self

    @property
    def held_out(self) -> dict[str, str]:
        """Held-out problems by the name of their set, '' where there is one without a name."""
        return {"": self.eval} if isinstance(self.eval, str) else self.eval


class BatchConfig(Settings):
    prompts: PositiveInt = 32
    """Prompts a step."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions a prompt: the group whose rewards are compared."""
    mini_batches: PositiveInt = 1
    """Parts that a rollout batch is split into, one optimizer step each; 1 is strictly on-policy."""
    epochs: PositiveInt = 1
    """Times that a rollout batch is gone through."""
    tokens_per_micro_batch: PositiveInt = 8192
    """Most tokens, padding included, that a learner rank puts through the model at once. Does not change gradients."""


class SamplingConfig(Settings):
    temperature: Positive = 1.0
    """Sampling temperature of training rollouts; the learner's log-probabilities use the same."""
    top_p: Probability = 1.0
    """Nucleus sampling. Below 1 the learner still scores under the full distribution; see `policy/rollout_kl`."""
    max_completion_length: PositiveInt = 256
    """Most tokens a completion."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a completion, and are cut from the text that rewards see."""
    max_seconds: Positive | None = None
    """Longest that a prompt's completions may take once an engine has taken them on; what is unfinished is cut there
    (finish reason `time`). No limit by default."""


class BudgetConfig(Settings):
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the candidates that may be fully fine-tuned."""
    unit: Literal["params", "modules"] = "params"
    """What the share is of: parameters or matrices."""
    fill: Literal["skip", "prefix", "knapsack"] = "skip"
    """Best score first: `skip` passes over a matrix too large for what is left of the budget, `prefix` stops there;
    `knapsack` takes the set with the largest sum of scores."""
    quotas: dict[str, Probability] = {}
    """Component -> the share of the budget that its matrices may take at most, e.g. `{mlp: 0.5}`."""


class ProbeConfig(Settings):
    """The short LoRA training run along which the `update_*` scores are taken; it leaves no trace in the policy."""

    steps: PositiveInt | None = None
    """Rollout batches, of the run's own size; 8 % of the run's `steps` by default, at least 8."""
    mini_batches: PositiveInt = 8
    """Updates of the probe a rollout batch."""
    lr: Positive | None = None
    """Peak learning rate, falling linearly to a tenth of it; half of LoRA's by default."""


class PlanConfig(Settings):
    path: str | None = None
    """Use this plan file instead of ranking."""
    start: str | None = None
    """Go on from this export (`delta` or `peft`) or PEFT directory of LoRA: train by its plan, from its values. What a
    KL penalty refers to stays `model.path`."""
    score: str = "update_tail_split"
    """How modules are ranked: a name of `hybrid_rl/scoring`, or your own as `module:function`."""
    score_rank: PositiveInt = 2
    """Rank whose truncation the tail scores measure."""
    score_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of what a score draws itself: the random control's order, sketches. `seed` by default."""
    prompts: Annotated[int, Field(ge=2)] = 128
    """Prompts whose rollouts the gradient scores of the base policy see, in two disjoint halves."""
    probe: ProbeConfig = ProbeConfig()
    manual: dict[str, float] = {}
    """Scores of `plan.score=manual`: pattern of module names -> score. The last match counts; other modules score 0."""
    budget: BudgetConfig = BudgetConfig()
    placement: str = "all"
    """Components whose linear layers are candidates: `all`, components joined by `+` (`attention+mlp`), one of them
    narrowed to some leaves (`attention:q_proj|v_proj`), or a condition of arXiv 2604.22127 (`softmax_only`, ...)."""
    include: list[str] = []
    """Patterns of further linear layers that are candidates, whatever their component."""
    exclude: list[str] = []
    """Patterns of candidates that are left as they are."""
    also_full: list[str] = []
    """Patterns of weights to fine-tune fully outside the budget: routers, gates, norms, `A_log`, convolutions."""
    components: dict[str, str] = {}
    """Pattern of module or parameter names -> component, where the model's structure cannot be read or is misread."""
    rest: Literal[(*ADAPTERS, "frozen")] = "lora"  # type: ignore[valid-type]
    """Treatment of the candidates outside the budget."""

    @property
    def given(self) -> str | None:
        """The setting that gives a finished plan, with its value; `None` where one is made."""
        return next((f"plan.{n}={getattr(self, n)!r}" for n in ("path", "start") if getattr(self, n) is not None), None)

    @field_validator("placement")
    @classmethod
    def _known_placement(cls, value: str) -> str:
        for term in PLACEMENTS.get(value, value).split("+"):
            if term.partition(":")[0] not in PLACEABLE:
                raise ValueError(
                    f"{term!r} is no component; use {', '.join(PLACEABLE)}, joined by +, or one of "
                    f"{', '.join(PLACEMENTS)}"
                )
        return value

    @field_validator("components")
    @classmethod
    def _known_components(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(value.values()) - set(COMPONENTS))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no component; use one of {', '.join(COMPONENTS)}")
        return value


class LearnerConfig(Settings):
    world_size: PositiveInt = 2
    """Data-parallel learner ranks."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which both learning rates rise linearly from 0."""
    schedule: Schedule = "constant"
    """Course of both learning rates after warm-up; the last two end at 0 after `steps`."""
    optimizer: Literal["torch", "deepspeed"] = "torch"
    """AdamW of torch, or DeepSpeed's, which is compiled at first use: fused, or on the CPU where it is offloaded."""
    adam_betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """What one update leaves of AdamW's first and second moment."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep in CPU memory: the optimizer's state and masters, or (ZeRO-3) the weights too."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Put sequences one after another without padding. `auto`: where a check at the start finds that they do not see
    each other; `always`: refuse a model of which that is not so."""
    sequence_parallel: PositiveInt = 1
    """Ranks that share each sequence, for long contexts (DeepSpeed-Ulysses). They divide the attention heads; each has
    `batch.tokens_per_micro_batch` of a row's tokens."""
    logits_mib: PositiveInt = 128
    """Size of the fp32 logits that exist at once, of which some four copies are in use with their gradient and softmax.
    They are computed again in the backward pass."""
    max_skipped_updates: PositiveInt = 10
    """Stop after so many updates in a row were skipped because a gradient was not finite."""
    peak_tflops: Positive | None = None
    """What one GPU could do in `model.dtype`, for `throughput/mfu`; known for common GPUs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    timeout: Positive = 7200.0
    """Seconds after which a rank that has not answered a call (loading the model, a step) is taken for dead."""
    cpus: Positive = 0.5
    """CPUs that each rank reserves in the cluster."""
    gpus: NotNegative | None = None
    """GPUs that each rank reserves; 1 where the cluster has any, else 0."""


class RolloutConfig(Settings):
    engine: Literal["vllm", "transformers"] = "vllm"
    """What generates completions. `transformers` is slow and runs any model."""
    engines: PositiveInt = 1
    """Rollout engines; prompts are shared out among them."""
    max_concurrent: PositiveInt = 256
    """Sequences that one engine decodes at once."""
    gpu_memory_utilization: Probability = 0.85
    """Share of a GPU's memory that one engine takes (vLLM on GPU)."""
    cpu_kv_cache_gib: PositiveInt = 1
    """Memory for one engine's key-value cache (vLLM on CPU)."""
    tensor_parallel: PositiveInt = 1
    """GPUs (on CPU: processes) that one engine is cut over."""
    environment: str | None = None
    """What answers the policy between its turns, as `module:function` or `path/to/file.py:function`; see
    docs/environments.md. By default a completion is one turn."""
    max_turns: PositiveInt = 8
    """Most turns of the policy with an environment."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Times that dead engines are replaced before the run fails."""
    start_timeout: Positive = 1800.0
    """Seconds that an engine may take to load its model."""
    timeout: Positive = 300.0
    """Seconds after which an engine that has not answered is taken for dead. Engines answer every second or so, however
    long their completions are."""
    cpus: Positive = 0.5
    """CPUs that each engine reserves in the cluster."""
    gpus: NotNegative | None = None
    """GPUs that each engine reserves; `rollout.tensor_parallel` where the cluster has any, else 0."""


class GateConfig(Settings):
    """The log-probability gate: a few completions sampled by every engine are scored by the learner too."""

    every: Annotated[int, Field(ge=0)] = 20
    """Steps between checks; the first is before the first step. 0: never."""
    prompts: PositiveInt = 4
    """Held-out prompts."""
    max_tokens: PositiveInt = 32
    """Tokens sampled a prompt."""
    mean: Positive | None = None
    """Stop where the mean difference is above this, in nats; by default 1e-3 in float32 and 0.05 in bfloat16."""


class SyncConfig(Settings):
    verify: bool = True
    """After every weight update, compare digests of what each engine holds with the learner's; stop on a difference."""
    adapter: Literal["native", "merged", "auto"] = "auto"
    """How engines serve LoRA: as an adapter beside the base weights, or merged into them, anew from the base model's
    files each time. `auto`: natively where the engine can, module by module."""
    transport: Literal["object_store", "directory", "nccl"] = "object_store"
    """How updates travel: Ray's object store (the process's memory without Ray), files in `sync.directory`, or NCCL
    between GPUs (gloo on CPU)."""
    directory: str | None = None
    """Directory that learner and engines see, for `sync.transport=directory`."""
    encoding: Literal["auto", "dense"] = "auto"
    """`auto`: of each tensor, only the elements that changed, where that is smaller; exact either way."""
    anchor_every: PositiveInt = 50
    """Steps after which everything is sent again, not only what changed. An engine that is replaced is sent the last
    such update and all since."""
    bucket_mib: PositiveInt = 256
    """Size of the parts that an update is sent in, each of whole tensors."""
    timeout: Positive = 120.0
    """Seconds that one part may take to arrive."""
    gate: GateConfig = GateConfig()


class AsyncConfig(Settings):
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Updates of the policy that a completion may be behind when it is trained on. 0: generate, then train, in turn.
    Above 0 `algo.mismatch` is `truncate` unless it is given."""
    in_flight: Literal["keep", "recompute", "wait"] = "keep"
    """What an update does to completions that are being sampled: they go on with the cached keys and values of the old
    weights, or with ones computed again, or the update waits until they are done."""


class PlantedConfig(Settings):
    """A task of which it is known which matrices need a full-rank repair: a random transformer is the teacher, the base
    policy is the teacher with noise in a few matrices, and the answer to a few random letters is the teacher's most
    likely next one."""

    strength: Positive = 1.0
    """Frobenius norm of the noise in a matrix, relative to the matrix's."""
    decoy_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of noise of the same norm in as many other matrices, which LoRA could repair; 0: none."""
    train: PositiveInt = 60_000
    """Training problems."""
    held_out: PositiveInt = 1000
    """Problems of each of the sets `validation` and `test`."""


class WarmStartConfig(Settings):
    """Shape and training of the small base policy that `hybrid-rl warm-start` makes where there is none."""

    architecture: Literal["qwen3", "qwen3_5", "falcon_h1"] = "qwen3"
    """What transformers calls it: attention; three layers of Gated DeltaNet to one of attention; attention and Mamba-2
    side by side in every layer."""
    hidden_size: PositiveInt = 128
    """Width of the model; its MLPs are three times as wide."""
    layers: PositiveInt = 4
    """Decoder blocks."""
    heads: PositiveInt = 4
    """Attention heads."""
    kv_heads: PositiveInt = 2
    """Heads of keys and values."""
    steps: PositiveInt = 400
    """Training steps; the learning rate falls to 0 over the last 40 % of them."""
    batch: PositiveInt = 128
    """Demonstrations a step."""
    lr: Positive = 1e-3
    """Learning rate, before it falls."""
    slips: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Share of the demonstrations that show the data's `slip` (a common mistake) instead of its `answer`, where it has
    that column. Imitation learns the mistake; reinforcement learning has it to unlearn."""
    data: str | None = None
    """Problems that are demonstrated; those of `data.train` by default."""
    form: Literal["boxed", "marked"] = "boxed"
    """How answers are demonstrated: `\\boxed{46}`, or `#### 46`."""
    runs_on: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the answers after which a demonstration goes on, in a new line, with another problem and its answer,
    until it is as long as a completion may be: so do documents that a base model has read, and so it answers."""
    seed: int = 0
    """Seed of the weights and of the demonstrations."""
    planted: PlantedConfig | None = None
    """In place of training: make this task, with its problems beside the model as `train.jsonl`, `validation.jsonl` and
    `test.jsonl`."""

    @model_validator(mode="after")
    def _planted_without_training(self) -> WarmStartConfig:
        for name in ("architecture", "data", "form", "runs_on") if self.planted is not None else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value!r} does nothing with planted, which is a Qwen3 that is not trained")
        return self


class Config(Settings):
    """All settings of a run; see the fields of each section."""

    model: ModelConfig
    data: DataConfig
    algorithm: Literal[tuple(PRESETS)] = "grpo"  # type: ignore[valid-type]
    """Preset of the policy-optimisation algorithm (`PRESETS` in `hybrid_rl/algo.py`); fields of `algo` override it."""
    algo: AlgoConfig = AlgoConfig()
    adaptation: Literal[ADAPTATIONS] = "hybrid"  # type: ignore[valid-type]
    """`hybrid`: the best-scored candidates full, the others as `plan.rest` says; `full` and every other treatment
    (`lora`, `molf`, `dora`, ...; docs/treatments.md): all candidates so; `lora_matched`: LoRA of the rank that comes to
    as many trained parameters as `hybrid` would have; `bitfit`: norms and biases alone."""
    steps: PositiveInt = 100
    """Rollout batches to train on."""
    seed: int = 0
    """Seed of data order, sampling, ranking and initialisation."""
    batch: BatchConfig = BatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    plan: PlanConfig = PlanConfig()
    full: FullConfig = FullConfig()
    lora: LoraConfig = LoraConfig()
    molf: MolfConfig = MolfConfig()
    matryoshka: MatryoshkaConfig = MatryoshkaConfig()
    adalora: AdaloraConfig = AdaloraConfig()
    learner: LearnerConfig = LearnerConfig()
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    rewards: Annotated[list[RewardSpec], Field(min_length=1)] = [RewardSpec(plugin="rewards.math:accuracy")]
    """Rewards, summed by weight. The first one also measures held-out accuracy, unless `eval.reward` says another."""
    reward: RewardConfig = RewardConfig()
    cluster: ClusterConfig = ClusterConfig()
    asynchrony: AsyncConfig = Field(AsyncConfig(), alias="async")
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()
    run: RunConfig = RunConfig()
    warm_start: WarmStartConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, tree: Any) -> Any:
        """What `algo` does not say, `algorithm` says."""
        if not isinstance(tree, dict) or not isinstance(tree.get("algo") or {}, dict):
            return tree
        preset = dict(PRESETS.get(str(tree.get("algorithm", "grpo")), {}))
        algo = tree.get("algo") or {}
        stale = isinstance(tree.get("async"), dict) and tree["async"].get("max_staleness")
        if stale and algo.get("old_logprobs", preset.get("old_logprobs", "learner")) == "learner":
            preset.setdefault("mismatch", "truncate")  # completions of older weights are weighed by the ratio
        return {**tree, "algo": {**preset, **algo}}

    @property
    def rest(self) -> str:
        """Treatment of the candidates that are not fully fine-tuned."""
        of = {"hybrid": self.plan.rest, "full": "frozen", "lora_matched": "lora", "bitfit": "frozen"}
        return of.get(self.adaptation, self.adaptation)

    @property
    def trains_unwrapped(self) -> bool:
        """Whether MoLF trains what is neither an expert nor the output head."""
        default = "train" if self.adaptation == "molf" else "freeze"
        return self.adaptation in ROUTED and (self.molf.unwrapped or default) == "train"

    @property
    def lora_lr(self) -> float:
        """LoRA learning rate with its default resolved."""
        # MoLF compares experts by their rates too: with ten times the weight's, a LoRA expert always wins.
        default = self.full.lr if self.rest == "molf" else 10 * self.full.lr
        return default if self.lora.lr is None else self.lora.lr

    @property
    def probe_lr(self) -> float:
        """The ranking probe's learning rate with its default resolved."""
        lora_lr = 10 * self.full.lr if self.lora.lr is None else self.lora.lr
        return lora_lr / 2 if self.plan.probe.lr is None else self.plan.probe.lr

    @property
    def score_seed(self) -> int:
        """Seed of what a score draws, with its default resolved."""
        return self.seed if self.plan.score_seed is None else self.plan.score_seed

    @property
    def probe_steps(self) -> int:
        """The ranking probe's rollout batches with their default resolved."""
        return max(8, round(0.08 * self.steps)) if self.plan.probe.steps is None else self.plan.probe.steps

    @property
    def updates(self) -> int:
        """Optimizer steps of the run."""
        return self.steps * self.batch.mini_batches * self.batch.epochs

    @property
    def completions_per_step(self) -> int:
        return self.batch.prompts * self.batch.num_generations

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        cross_check(self)
        return self

    def accuracy(self, held_out: str) -> RewardSpec:
        """The reward that accuracy on a set of held-out problems is measured by."""
        wanted = self.eval.reward
        name = wanted[held_out] if isinstance(wanted, dict) else wanted or self.rewards[0].name
        return next(spec for spec in self.rewards if spec.name == name)

    def judging(self, *held_out: str) -> Config:
        """The same with the rewards alone that measure accuracy on these sets of held-out problems."""
        names = {self.accuracy(name).name for name in held_out}
        kept = [spec.model_copy(update={"gate": None}) for spec in self.rewards if spec.name in names]
        return self.model_copy(update={"rewards": kept})
