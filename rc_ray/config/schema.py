"""The typed configuration: every option, its default and its meaning, in one place.

Invariant: this package imports neither ray, torch nor vllm, so a login node can validate a run in a fraction of a second.
Defaults live here only. An unknown key, a wrong type or an impossible combination is a `ConfigError` (see `load.py`).

    rc-ray plan my.yaml        # validates and prints the resolved configuration, starts nothing
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, Field, field_validator, model_validator

from rc_ray.config.base import NAME_PATTERN, PARALLEL_SIZES, RESERVED_NAMES, PoolConfig, Section, deployment, engine_arguments
from rc_ray.config.rewards import JudgeReward, RewardConfig
from rc_ray.config.selection import SelectionConfig
from rc_ray.config.training import TrainingConfig


class PromptsConfig(Section):
    """Where prompts come from."""

    path: str
    """A Parquet, JSONL or CSV file, a folder or glob of them, `hub:org/name` for a Hub dataset, or `embedded:NAME`."""

    format: Literal["auto", "parquet", "jsonl", "csv"] = "auto"
    """File format; `auto` goes by the file name's ending."""

    column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages `{role, content}` that ends with a user message."""

    split: str = "train"
    """Split of a Hub dataset. Ignored for files, hence an error when set for them."""

    revision: str | None = None
    """Git revision of a Hub dataset."""

    system: str | None = None
    """System message put before every prompt that has none."""

    limit: int | None = Field(None, ge=1)
    """Take only the first so many rows."""

    @model_validator(mode="after")
    def _hub_options(self) -> PromptsConfig:
        if not self.path.startswith("hub:"):
            for name in ("split", "revision"):
                if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"`{name}` applies to Hub datasets only (path: hub:org/name); remove it")
        return self


class PolicyConfig(Section):
    """One of several policies that candidates come from."""

    model: str | None = None
    """Hub id, local folder, or `embedded:NAME`. None: the top-level `model`."""

    revision: str | None = None
    """Git revision of a Hub model given here."""

    adapter: str | None = None
    """A LoRA adapter on that model, in PEFT's format: a folder or Hub id."""

    weight: float = Field(1.0, gt=0)
    """Share of the candidates, relative to the other policies' weights."""

    trust_remote_code: bool = False
    """Run Python code from the repository of the model given here. Off unless you trust this one model."""

    @model_validator(mode="after")
    def _of_the_model(self) -> PolicyConfig:
        for name in ("revision", "trust_remote_code"):
            if self.model is None and getattr(self, name):
                raise ValueError(
                    f"`{name}` has no effect without a `model` here; the top-level `{name}` counts for the top-level `model`"
                )
        return self


class GenerationConfig(Section):
    """How candidates are sampled with vLLM."""

    adapter: str | None = None
    """A LoRA adapter on `model` to sample with, in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`): a folder or Hub
    id. Training would start without it, hence an error unless training.enabled is false."""

    policies: dict[str, PolicyConfig] = {}
    """Several policies, by a name of your own that every candidate carries. Each gives its share of every prompt's candidates, to within
    one; policies with the same model share its engines. Training starts from the top-level `model` all the same. Empty: that `model` is
    the only one, and called `policy`."""

    num_candidates: int = Field(8, ge=2)
    """N: answers sampled per prompt. At least 2, since a pair needs two."""

    max_candidates: int | None = Field(None, ge=2)
    """Adaptive N: a group that lacks a pair after `num_candidates` answers is given as many again, and so on up to this number; the
    answers are those that a fixed N would have given. None: no more. Needs a strategy with the RC rule, and all pools at once."""

    target_gap: float | None = Field(None, gt=0)
    """Adaptive N: a pair with a smaller gap counts as none, unless there are `max_candidates` answers."""

    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. Must be positive: greedy candidates are all alike."""

    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling mass."""

    top_k: int = Field(0, ge=0)
    """Sample among the k most likely tokens; 0 means all."""

    max_tokens: int = Field(512, ge=1)
    """Most tokens an answer may have. An answer cut here has finish_reason `length` and by default never wins a pair."""

    max_model_len: int = Field(2048, ge=2)
    """Context length in tokens. A prompt with prompt tokens + max_tokens > max_model_len is dropped as
    `prompt_too_long`, so that no answer is cut short without a word."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and activations. `auto`: bfloat16 on GPUs and on CPUs with AVX-512 BF16, float32 on other CPUs."""

    stop: tuple[str, ...] = ()
    """Strings that end an answer."""

    group_timeout_s: float | None = Field(None, gt=0)
    """A group that is not finished so many seconds after its first token is given up as `generation_failed`; waiting for a place in the
    engine does not count. Depends on how fast the engine is, so results may differ from run to run. None: no limit."""

    engine: dict[str, Any] = engine_arguments()
    """Further vLLM engine arguments by vLLM's own names, e.g. `{tensor_parallel_size: 2, gpu_memory_utilization: 0.85}`;
    checked against vLLM's own list before anything starts. Those of memory, batches and devices may change when a run is resumed."""

    pool: PoolConfig = deployment(PoolConfig())
    """The pool of vLLM engines. With several policies each different model has a pool like this one."""

    @field_validator("policies")
    @classmethod
    def _policy_names(cls, value: dict[str, PolicyConfig]) -> dict[str, PolicyConfig]:
        for name in value:
            if not NAME_PATTERN.match(name):
                raise ValueError(f"policy name {name!r} must be letters, digits and underscores, e.g. `large`")
        if len(value) == 1 and next(iter(value.values())).weight != 1:
            raise ValueError("a weight has no effect with one policy; remove it, or add a policy")
        return value

    @model_validator(mode="after")
    def _policies(self) -> GenerationConfig:
        if self.policies and self.adapter is not None:
            raise ValueError("adapter has no effect beside policies; set policies.NAME.adapter")
        if len(self.policies) > 1 and self.max_candidates is not None:
            raise ValueError(
                "max_candidates with several policies: of more candidates the policies' shares are other ones, so the first answers would not "
                "be those of a fixed N; use one policy, or a fixed num_candidates"
            )
        adapters = self.adapter is not None or any(policy.adapter is not None for policy in self.policies.values())
        if "enable_lora" in self.engine:
            raise ValueError("engine.enable_lora is set where there is an adapter; give `adapter` or `policies.NAME.adapter`")
        for name in self.engine:
            if "lora" in name and not adapters:
                raise ValueError(f"engine.{name} has no effect without an adapter; give `adapter` or `policies.NAME.adapter`")
        return self

    @property
    def most_candidates(self) -> int:
        """Answers that a prompt gets at most."""
        return self.max_candidates or self.num_candidates

    @property
    def devices_per_engine(self) -> int:
        """Devices one engine needs: tensor x pipeline parallel size."""
        tensor, pipeline = (self.engine.get(name, 1) for name in PARALLEL_SIZES)
        return int(tensor * pipeline)

    @model_validator(mode="after")
    def _devices(self) -> GenerationConfig:
        for name in PARALLEL_SIZES:
            if not isinstance(self.engine.get(name, 1), int) or self.engine.get(name, 1) < 1:
                raise ValueError(f"engine.{name} ({self.engine[name]!r}) must be a whole number of at least 1")
        needed, given = self.devices_per_engine, self.pool.num_gpus
        if needed > 1 and given and given != needed:
            raise ValueError(
                f"pool.num_gpus ({given:g}) is not tensor_parallel_size x pipeline_parallel_size of the engine ({needed}); remove it"
            )
        return self

    @model_validator(mode="after")
    def _lengths(self) -> GenerationConfig:
        if self.max_tokens >= self.max_model_len:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) leaves no room for a prompt in max_model_len ({self.max_model_len}); "
                "lower the first or raise the second"
            )
        if self.max_candidates is not None and self.max_candidates <= self.num_candidates:
            raise ValueError(
                f"max_candidates ({self.max_candidates}) must be above num_candidates ({self.num_candidates}), the number to begin with"
            )
        if self.target_gap is not None and self.max_candidates is None:
            raise ValueError("target_gap has no effect without max_candidates; set that too, or remove it")
        owned = {"model", "seed", "dtype", "max_model_len", "revision", "trust_remote_code"} & set(self.engine)
        if owned:
            raise ValueError(f"engine.{sorted(owned)[0]} has a field of its own in the configuration; set it there")
        if "data_parallel_size" in self.engine:
            raise ValueError("engine.data_parallel_size: engines side by side are a pool; set pool.size")
        if "tokenizer" in self.engine:
            raise ValueError(
                "engine.tokenizer: prompts are rendered with the model's own tokenizer; save the other one in the model's folder"
            )
        return self


class EvaluationConfig(Section):
    """Before/after comparison on held-out prompts."""

    prompts: PromptsConfig | None = None
    """Held-out prompts. None: no evaluation. Prompts that also occur in the training prompts are left out and counted."""

    num_samples: int = Field(2, ge=1)
    """Answers per prompt and policy."""

    confidence: float = Field(0.95, gt=0, lt=1)
    """Level of the bootstrap intervals."""

    num_bootstrap: int = Field(2000, ge=100)
    """Bootstrap resamples (of prompts)."""


class BudgetConfig(Section):
    """When sampling ends before all prompts are sampled. Blocks in work are finished; the run then selects from what there is, and
    stops. With a larger budget it goes on. What comes out of a prompt does not depend on it, only how many prompts there are."""

    target_pairs: int | None = Field(None, ge=1)
    """Enough prompts with a pair. Looked at while sampling, with the scale of the data taken as 1 where it is not known yet, and rewards
    whose transform is not fitted yet as they are."""

    max_generated_tokens: int | None = Field(None, ge=1)
    """Enough tokens sampled, over all sessions of the run."""

    deadline: AwareDatetime | None = None
    """When to end, e.g. `2027-01-31T08:00:00Z`."""


class RoundsConfig(Section):
    """On-policy training in rounds: sample, score, select and train, again with the policy that came out. Every round is a run of its own in
    `output/round-1`, `output/round-2`, ..."""

    number: int = Field(1, ge=1)
    """How many; `rounds: 3` is short for `rounds: {number: 3}`. May be raised later."""

    reference: Literal["previous", "initial"] = "previous"
    """The reference of a round from the second on: the policy that it starts from, or the very first one."""

    max_reward_drop: float | None = Field(None, ge=0)
    """No further round after one in which the mean held-out reward of an objective fell by more than this."""


class ClusterConfig(Section):
    """Where Ray runs. Nothing here changes what comes out."""

    address: str | None = None
    """None: join the cluster named by RAY_ADDRESS (as in `ray job submit`), else start a local one. `local`: always start
    one. `auto` or `host:port`: join that one, or fail."""

    num_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of a local cluster. None: the larger of 8 and the cores, since Ray's CPUs are tickets, not cores."""

    task_cpus: float = Field(0.25, gt=0)
    """Ray CPUs per small task (reading, selection, writing)."""

    chunk_size: int = Field(16, ge=1)
    """Prompts per ledger chunk: the unit that is committed, retried, and lost in a kill (some per actor, see README). Each is a few files, which are
    listed when a run goes on: for millions of prompts take some hundreds."""

    mode: Literal["auto", "streaming", "phased"] = "auto"
    """`streaming`: rewards are computed while others are still generated. `phased`: generate all, then score; needs fewer
    devices. `auto`: streaming where all pools fit at once."""

    progress_interval_s: float = Field(5.0, gt=0)
    """Seconds between progress lines."""

    stall_timeout_s: float = Field(1800.0, gt=0)
    """The run ends, resumable, when nothing has moved for so long: no group finished, no text read by a network, no request answered. Longer than a
    model takes to load, a group to be sampled, and a rule, a class of one's own that counts nothing or a judge in vLLM to score a chunk."""

    max_attempts: int = Field(3, ge=1)
    """How often a group may take its process down with it before it is recorded as failed; other groups go on."""

    max_failed_fraction: float = Field(0.5, gt=0, le=1)
    """The run ends when more than this share of the latest 1,024 groups that a stage finished failed (an error of the engine, a missing
    reward), looked at from 32 groups on. What failed is tried again when the run is resumed. 1: never."""


class Config(Section):
    """A whole run: prompts, candidates, rewards, selection, training, evaluation."""

    model: str
    """The policy: Hub id, local folder, or `embedded:NAME`. What is trained and evaluated, also where `generation.policies` sample."""

    revision: str | None = None
    """Git revision of a Hub policy."""

    trust_remote_code: bool = False
    """Run Python code from the policy's repository, from those of adapters on it, and from that of a model given to `rc-ray evaluate`. Off unless you
    trust them."""

    output: str = deployment()
    """The run directory: a path, or any URI that pyarrow reads (s3://, gs://, ...). Every node must reach it."""

    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the whole run: sampling, training and bootstrap derive theirs from it."""

    prompts: PromptsConfig
    """The training prompts."""

    generation: GenerationConfig = GenerationConfig()
    """Sampling."""

    rewards: dict[str, RewardConfig]
    """One entry per objective."""

    selection: SelectionConfig = SelectionConfig()
    """The RC rule."""

    training: TrainingConfig = TrainingConfig()
    """DPO."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Before/after."""

    budget: BudgetConfig = deployment(BudgetConfig())
    """When to end early."""

    rounds: RoundsConfig = deployment(RoundsConfig())
    """On-policy rounds. What comes out of a round does not depend on how many there are."""

    cluster: ClusterConfig = deployment(ClusterConfig())
    """Ray."""

    @field_validator("rounds", mode="before")
    @classmethod
    def _number_of_rounds(cls, value: Any) -> Any:
        return {"number": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("rewards")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not NAME_PATTERN.match(name):
                raise ValueError(f"objective name {name!r} must be letters, digits and underscores, e.g. `helpful`")
            if name in RESERVED_NAMES:
                raise ValueError(
                    f"objective name {name!r} is one that a run uses itself; call it otherwise, e.g. `{name}_quality`"
                )
        return value

    @model_validator(mode="after")
    def _policies(self) -> Config:
        seen: dict[Any, str] = {}
        for name, policy in self.generation.policies.items():
            model = (policy.model, policy.revision) if policy.model else (self.model, self.revision)
            same = seen.setdefault((model, policy.adapter), name)
            if same != name:
                raise ValueError(
                    f"generation.policies: {same!r} and {name!r} are the same policy; keep one and add the weights"
                )
        if self.generation.adapter is not None and self.training.enabled:
            raise ValueError(
                f"generation.adapter = {self.generation.adapter!r}: DPO starts from `model`, without the adapter, and so would train another "
                "policy than the one sampled; set training.enabled: false, or merge the adapter into the model and give that as `model`"
            )
        return self

    @model_validator(mode="after")
    def _rounds(self) -> Config:
        rounds, policies = self.rounds, self.generation.policies.values()
        if self.seed + rounds.number > 1 << 32:
            raise ValueError(f"the last round's seed, {self.seed + rounds.number - 1}, is more than NumPy takes; lower seed")
        if rounds.number > 1 and not self.training.enabled:
            raise ValueError(
                "rounds goes on with the trained policy, but training.enabled is false; enable it, or leave rounds out"
            )
        if rounds.number > 1 and not self.training.merge_adapter:
            raise ValueError("rounds goes on with a whole policy; set training.merge_adapter: true, or leave rounds out")
        if rounds.number > 1 and policies and all(policy.model for policy in policies):
            raise ValueError(
                "rounds samples from the trained policy, which is none of generation.policies; add one without `model`"
            )
        if rounds.number > 1 and rounds.reference == "initial" and self.training.reference.model is not None:
            raise ValueError(
                "rounds.reference: initial has no effect with training.reference.model, which is taken in every round; leave one out"
            )
        if rounds.number > 1 and rounds.reference == "initial" and self.training.recipe == "sequential":
            raise ValueError(
                "rounds.reference: initial cannot be kept by training.recipe: sequential, whose references are the policies before; leave one out"
            )
        if rounds.number == 1 and rounds != RoundsConfig():
            name = "reference" if rounds.max_reward_drop is None else "max_reward_drop"
            raise ValueError(f"rounds.{name} has no effect on one round; set rounds.number")
        if rounds.max_reward_drop is not None and self.evaluation.prompts is None:
            raise ValueError("rounds.max_reward_drop needs held-out rewards; set evaluation.prompts, or leave it out")
        return self

    @model_validator(mode="after")
    def _pairwise(self) -> Config:
        """Rewards that compare the answers of a group with each other stand for the whole group only."""
        names = [n for n, reward in self.rewards.items() if isinstance(reward, JudgeReward) and reward.method == "pairwise"]
        if names and self.generation.max_candidates is not None:
            raise ValueError(
                f"generation.max_candidates scores the first answers of a group before there are more, but rewards.{names[0]} compares all of "
                "them with each other (method: pairwise); use method: score or yes, or a fixed num_candidates"
            )
        if names and self.training.enabled and self.evaluation.prompts is not None:
            raise ValueError(
                f"evaluation.prompts compares rewards before and after training, but those of rewards.{names[0]} are shares within a group "
                "(method: pairwise), whose mean is 1/2 in both; use method: score or yes, or leave evaluation.prompts out"
            )
        return self

    @model_validator(mode="after")
    def _objectives(self) -> Config:
        objectives = self.selection.objective_names(self.rewards)
        if self.selection.strategy == "rc_filter":
            raise ValueError(
                "selection.strategy rc_filter filters existing pairs, but a run samples groups; use rcs, or `rc-ray select --input`"
            )
        if self.generation.max_candidates is not None:
            growing = [name for name, reward in self.rewards.items() if reward.pool.max_size is not None]
            if growing:
                raise ValueError(
                    f"rewards.{growing[0]}.pool.max_size has no effect with generation.max_candidates, where the engines ask a fixed number "
                    "of scorers; set pool.size"
                )
            if self.selection.strategy not in ("rcs", "rc_all"):
                raise ValueError(
                    f"generation.max_candidates has no effect with selection.strategy {self.selection.strategy}, which takes a pair from "
                    "any group; use rcs or rc_all, or remove it"
                )
            fitted = [name for name, transform in self.selection.transforms.items() if transform.needs_fit]
            if fitted:
                raise ValueError(
                    f"generation.max_candidates decides while sampling, when the data that selection.transforms.{fitted[0]} "
                    f"({self.selection.transforms[fitted[0]].kind}) is fitted to are not there; use kind identity with clip, or lsc with a "
                    "given reference, or remove it"
                )
            by_scale = (
                self.selection.margin_unit == "scale"
                or any(map(self.selection.is_split, self.selection.ensembles))
                or self.generation.target_gap is not None
            )
            if by_scale and self.selection.needs_scale_of_data:
                raise ValueError(
                    "generation.max_candidates decides while sampling, when the scale of the data is not known, but the selection depends "
                    "on it; give selection.scale, or use scale: group, or gap: sum"
                )
        if self.selection.strategy in ("rcs", "rc_all", "pareto", "mixed") and len(objectives) < 2:
            raise ValueError(
                f"rewards has {len(objectives)} objective(s), but selection.strategy {self.selection.strategy} compares at least 2; "
                "add another objective under `rewards`"
            )
        return self
