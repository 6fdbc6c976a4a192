"""The kinds of rewards: `rewards.<objective>.kind`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rc_ray.config.base import PARALLEL_SIZES, PoolConfig, Section, deployment, engine_arguments, secret_parameter

NamedModel = tuple[str, str | None, bool]
NamedModels = dict[str, NamedModel]
# vLLM's engine arguments that a reward sets itself, and what there is to set instead.
OWN_ARGUMENTS = {name: f"set `{name}`" for name in ("model", "revision", "trust_remote_code", "dtype")} | {
    "max_model_len": "set `max_length`",
    "load_format": "weights are read from safetensors only",
}
OF_CLASSIFIER = OWN_ARGUMENTS | {
    "max_num_batched_tokens": "set `max_batch_tokens`",
    "runner": "a classifier has one",
    "convert": "a classifier has one",
    "pooler_config": "the score is the classifier's own",
    "tensor_parallel_size": "an engine of a reward has one device",
    "pipeline_parallel_size": "an engine of a reward has one device",
}


def _refuse(given: dict[str, Any], own: dict[str, str]) -> None:
    """Raises for the first of the engine arguments that is in the table."""
    for name in given:
        if name in own:
            raise ValueError(f"engine_arguments.{name} is not for you to set: {own[name]}; remove it")


class ClassifierReward(Section):
    """A Hugging Face sequence classifier."""

    kind: Literal["classifier"]
    """Reward from `AutoModelForSequenceClassification`."""

    model: str
    """Hub id, local folder, or `embedded:NAME`."""

    revision: str | None = None
    """Git revision of a Hub model."""

    adapter: str | None = None
    """LoRA adapter in PEFT's format, safetensors only: Hub id or local folder. It is merged into the model when that is loaded, with whatever
    else is saved in it, such as the classifier's head; its own tokenizer and template count where it has them. With `engine: transformers`."""

    adapter_revision: str | None = None
    """Git revision of a Hub adapter."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the network; the rewards are the same, to rounding. `vllm` reads what the answers of a prompt begin with only once (prefix
    caching; models that look backwards only) and needs a vLLM that supports the architecture. On CPUs, the sequence classifiers of Llama,
    Qwen2 and BERT (MiniLM among them, without prefix caching) are tested; it has KV memory of its own, see VLLM_CPU_KVCACHE_SPACE."""

    engine_arguments: dict[str, Any] = engine_arguments()
    """Further arguments of `engine: vllm` by vLLM's own names, e.g. `{gpu_memory_utilization: 0.5}`."""

    label: int | str | None = None
    """Which of several labels the reward is about: its index or its name in the model's configuration. None: the model has one logit."""

    label_score: Literal["log_odds", "logit"] | None = None
    """Reward from the label. `log_odds` (taken when None): log p / (1 - p) under the softmax over all, for labels of which one is true.
    `logit`: as it is, for independent heads, such as those of a multi-objective reward model."""

    max_length: int | None = Field(None, ge=8)
    """Most tokens of prompt and answer together; None takes the model's own limit. See `truncate` for longer texts."""

    truncate: Literal["prompt_start", "answer_end"] | None = None
    """What happens to a text that is too long. None: it has no reward (missing, with the reason). `prompt_start`: the first tokens of the
    conversation before the answer are left out; `answer_end`: the last ones of the answer. What the model's template writes around the messages
    stays, also after the answer. Still missing is the reward of a text that would lose its whole prompt, or its whole answer."""

    max_batch_tokens: int = Field(8192, ge=64)
    """Tokens per forward pass, with padding; fewer for a while after memory ran out (`engine: vllm` does not pad, nor adapt)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 on GPUs, float32 on CPUs."""

    trust_remote_code: bool = False
    """Run Python code from the model's repository. Off unless you trust this one model."""

    self_test: bool = deployment(True)
    """Look, when the model is loaded, whether it reads texts as it should (see `rc_ray.rewards.self_test`); a failure ends the run."""

    pool: PoolConfig = deployment(PoolConfig())
    """This objective's actor pool."""

    @model_validator(mode="after")
    def _label(self) -> ClassifierReward:
        if self.label is None and self.label_score is not None:
            raise ValueError("label_score has no effect without label; choose the label, or remove it")
        return self

    @model_validator(mode="after")
    def _engine(self) -> ClassifierReward:
        if self.adapter_revision is not None and self.adapter is None:
            raise ValueError("adapter_revision has no effect without adapter; give the adapter, or remove it")
        if self.engine == "transformers":
            if self.engine_arguments:
                raise ValueError("engine_arguments have no effect with engine: transformers; set engine: vllm, or remove them")
            return self
        if self.adapter is not None:
            raise ValueError(
                "adapter is merged into the model by engine: transformers only; use that, or merge it into a model of its own "
                "(PEFT's `merge_and_unload`) and give that as `model`"
            )
        of_adapters = {name: "there is no adapter" for name in self.engine_arguments if "lora" in name}
        _refuse(self.engine_arguments, OF_CLASSIFIER | of_adapters)
        if self.pool.num_gpus is not None and self.pool.num_gpus > 1:
            raise ValueError(
                f"pool.num_gpus ({self.pool.num_gpus:g}) is more than the one device that engine: vllm uses; lower it"
            )
        return self

    def models(self) -> NamedModels:
        """Name and revision of each model it loads, and whether it is an adapter, by field."""
        found: NamedModels = {"model": (self.model, self.revision, False)}
        return found if self.adapter is None else {**found, "adapter": (self.adapter, self.adapter_revision, True)}


class ImplicitReward(Section):
    """The implicit reward of a policy that was aligned on one objective: beta x (its log-prob - that of its reference)."""

    kind: Literal["implicit"]
    """Reward from two causal language models (DPO, arXiv 2305.18290)."""

    policy: str
    """The aligned policy: Hub id, local folder, or `embedded:NAME`."""

    policy_revision: str | None = None
    """Git revision of a Hub model."""

    reference: str
    """What it was aligned from."""

    reference_revision: str | None = None
    """Git revision of a Hub model."""

    beta: float = Field(0.1, gt=0)
    """As it was aligned with; the unit of the reward."""

    max_length: int | None = Field(None, ge=8)
    """Most tokens of prompt and answer together; None takes the models' own limits. A longer text has no reward, it is never cut."""

    max_batch_tokens: int = Field(2048, ge=64)
    """Padded tokens per forward pass; fewer for a while after memory ran out. Each needs the logits of the whole vocabulary."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 on GPUs, float32 on CPUs."""

    policy_trust_remote_code: bool = False
    """Run Python code from the policy's repository. Off unless you trust this one model."""

    reference_trust_remote_code: bool = False
    """Run Python code from the reference's repository. Off unless you trust this one model."""

    self_test: bool = deployment(True)
    """As a classifier's, of both models."""

    pool: PoolConfig = deployment(PoolConfig())
    """This objective's actor pool."""

    def models(self) -> NamedModels:
        """See `ClassifierReward.models`."""
        return {
            "policy": (self.policy, self.policy_revision, False),
            "reference": (self.reference, self.reference_revision, False),
        }


class RuleReward(Section):
    """A Python function over a batch of answers."""

    kind: Literal["rule"]
    """Reward from a function `f(prompts, answers, **args) -> list[float | None]`."""

    function: str
    """`module:name`, e.g. `rc_ray.rewards.rules:length_near`."""

    args: dict[str, Any] = {}
    """Keyword arguments of the function."""

    pool: PoolConfig = deployment(PoolConfig())
    """This objective's actor pool."""

    @field_validator("function")
    @classmethod
    def _module_and_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ValueError("must be `module:name`, e.g. rc_ray.rewards.rules:length_near")
        return value

    def models(self) -> NamedModels:
        """None."""
        return {}


class CustomReward(Section):
    """A class of the user's own."""

    kind: Literal["custom"]
    """Reward from an object with `score(prompts, answers) -> list[float | None]`; see `rc_ray.rewards.custom`."""

    class_path: str = Field(alias="class")
    """`path/to/file.py:ClassName`, whose file is sent to every node, or `module:ClassName`, which every node must be able to import."""

    args: dict[str, Any] = {}
    """Keyword arguments of the class."""

    pool: PoolConfig = deployment(PoolConfig())
    """This objective's actor pool; on CPUs unless `num_gpus` is given."""

    @field_validator("class_path")
    @classmethod
    def _file_or_module_and_name(cls, value: str) -> str:
        if not re.fullmatch(r"(.*[^/\\]\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*", value):
            raise ValueError("must be `path/to/file.py:ClassName` or `module:ClassName`, e.g. my_rewards.py:Truthful")
        return value

    def models(self) -> NamedModels:
        """None that is known."""
        return {}


def _no_effect(section: Section, names: Iterable[str], where: str) -> None:
    """Refuses fields that are set to something and are not looked at."""
    for name in names:
        if getattr(section, name) != type(section).model_fields[name].default:
            raise ValueError(f"{name} has no effect {where}; remove it")


class ServiceReward(Section):
    """What rewards from a service have in common."""

    url: str | None = None
    """`https://...`; `http://...` for what sends no token, or stays on this machine."""

    token_env: str | None = deployment(None)
    """Environment variable, on every node, with the token that is sent as `Authorization: Bearer ...`. The token itself belongs
    nowhere in a configuration."""

    ca_file: str | None = deployment(None)
    """Certificates to trust instead of the usual ones, e.g. of a company. The server's certificate is always checked."""

    num_connections: int = deployment(4, ge=1)
    """Requests at the same time, of each actor."""

    timeout_s: float = deployment(60.0, gt=0)
    """Longest wait for a connection, and for each part of an answer."""

    max_retries: int = deployment(8, ge=0)
    """How often a request is repeated after a failed connection, a timeout, or status 429, 500, 502, 503 or 504; the first time
    at once, then after a wait that doubles from a second on, or is what `Retry-After` says, of two minutes at most. Eight wait two minutes in all, so that a limit per minute passes
    where the service names no wait. After the last one the scores of its answers are missing."""

    max_requests_per_minute: float | None = deployment(None, gt=0)
    """Requests, repetitions among them, that each actor begins per minute at most, evenly spaced: the service's limit divided by the number
    of actors. None: no limit but `num_connections`."""

    pool: PoolConfig = deployment(PoolConfig())
    """This objective's actor pool."""

    @model_validator(mode="after")
    def _safe(self) -> ServiceReward:
        if self.url is None:
            return self
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must begin with https:// or http:// and name a host")
        if parts.username or parts.password:
            raise ValueError(
                "url holds a user name or password; put the token into an environment variable and name that in token_env"
            )
        if (secret := secret_parameter(parts.query)) is not None:
            raise ValueError(
                f"url holds {secret!r}, which looks like a key and would be kept with the run; put it into an environment variable and name that in "
                "token_env"
            )
        if self.token_env is not None and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError("url begins with http://, so the token of token_env could be read on its way; use https://")
        return self

    def models(self) -> NamedModels:
        """None that is loaded here."""
        return {}


class HttpReward(ServiceReward):
    """A service that scores answers: JSON in and out.

    Sent is `{"items": [{"prompt": [{"role", "content"}, ...], "answer": "..."}, ...]}`; expected is `{"scores": [1.5, null, ...]}`, one number
    per item, or null where there is none.
    """

    kind: Literal["http"]
    """Reward from a POST request per batch."""

    url: str
    """`https://...`; `http://...` for what sends no token, or stays on this machine."""

    batch_size: int = deployment(32, ge=1)
    """Answers per request."""


# Fields of a judge that count in one place only: at an endpoint, or in an engine here.
AT_ENDPOINT = ("token_env", "ca_file", "num_connections", "timeout_s", "max_retries", "max_requests_per_minute")
IN_ENGINE = ("revision", "trust_remote_code", "max_length", "dtype", "engine_arguments")


class JudgeReward(ServiceReward):
    """A language model that judges answers by a criterion: behind an OpenAI-compatible endpoint, or loaded here with vLLM."""

    kind: Literal["judge"]
    """Reward from one chat completion per answer, or two per pair of answers."""

    url: str | None = None
    """Of an endpoint's chat completions, e.g. `https://host/v1/chat/completions`. None: the model is loaded in this objective's actors."""

    model: str
    """Name of the model at the endpoint; without `url` a Hub id, local folder, or `embedded:NAME`."""

    criterion: str = Field(min_length=1)
    """What a good answer is, in a sentence or a whole rubric, e.g. `The answer is truthful, and says so where it does not know.`"""

    method: Literal["score", "yes", "pairwise"] = "score"
    """`score`: a whole number on a scale, as JSON by a schema. `yes`: log p(yes) - log p(no) of the reply's first token, which is finer.
    `pairwise`: the answers of a prompt are compared with each other, each two in both orders; the reward is an answer's share of points,
    1 for a win in both orders and 1/2 where the orders disagree or neither is better. It means nothing beside answers of other groups."""

    lowest: int = 1
    """Lowest score."""

    highest: int = 10
    """Highest score."""

    max_tokens: int = Field(64, ge=1)
    """Most tokens of a reply with a score or a comparison; a longer one is cut, and does not count."""

    max_comparisons: int | None = Field(None, ge=2, multiple_of=2)
    """With `pairwise`, comparisons of one answer: half of them with the next and half with the previous answers on a circle in an order drawn
    by hash. N answers then take N x max_comparisons requests. None, or where a group has no more: with all others, N x (N - 1) requests."""

    revision: str | None = None
    """Git revision of a Hub model that is loaded here."""

    trust_remote_code: bool = False
    """Run Python code from the repository of a model that is loaded here. Off unless you trust this one model."""

    max_length: int | None = Field(None, ge=8)
    """Most tokens of question and reply together in an engine here; None takes 8192, or the model's own limit where that is lower. What is
    longer is not judged, and never cut."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of a model that is loaded here. `auto`: bfloat16 on GPUs, float32 on CPUs."""

    engine_arguments: dict[str, Any] = engine_arguments()
    """Further vLLM engine arguments for a model that is loaded here, by vLLM's own names; checked against vLLM's own list."""

    @field_validator("method", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return "yes" if value is True else value  # as YAML reads the bare word

    @model_validator(mode="after")
    def _scale(self) -> JudgeReward:
        if self.highest <= self.lowest:
            raise ValueError(f"highest ({self.highest}) must be above lowest ({self.lowest})")
        return self

    @model_validator(mode="after")
    def _effective(self) -> JudgeReward:
        if self.url is None:
            _no_effect(self, AT_ENDPOINT, "without `url`, where the model is loaded here")
        else:
            _no_effect(self, IN_ENGINE, "with `url`, where the model runs elsewhere")
        where = f"with method: {self.method}"
        if self.method != "score":
            _no_effect(self, ("lowest", "highest"), where)
        if self.method == "yes":
            _no_effect(self, ("max_tokens",), where)
        if self.method != "pairwise":
            _no_effect(self, ("max_comparisons",), where)
        return self

    @model_validator(mode="after")
    def _engine(self) -> JudgeReward:
        _refuse(self.engine_arguments, OWN_ARGUMENTS)
        if self.max_length is not None and self.max_tokens >= self.max_length:
            raise ValueError(f"max_tokens ({self.max_tokens}) leaves no room for a question in max_length ({self.max_length})")
        sizes = {name: self.engine_arguments.get(name, 1) for name in PARALLEL_SIZES}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"engine_arguments.{name} ({size!r}) must be a whole number of at least 1")
        devices = math.prod(sizes.values())
        if devices > 1 and self.pool.num_gpus != devices:
            raise ValueError(
                f"an engine with tensor_parallel_size x pipeline_parallel_size = {devices} needs pool.num_gpus: {devices}, on one node"
            )
        return self

    def models(self) -> NamedModels:
        """See `ClassifierReward.models`."""
        return {"model": (self.model, self.revision, False)} if self.url is None else {}


RewardConfig = Annotated[
    ClassifierReward | CustomReward | HttpReward | ImplicitReward | JudgeReward | RuleReward, Field(discriminator="kind")
]
