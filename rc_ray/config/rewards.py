"""The kinds of rewards: `rewards.<objective>.kind`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rc_ray.config.base import PoolConfig, Section, deployment


class ClassifierReward(Section):
    """A Hugging Face sequence classifier."""

    kind: Literal["classifier"]
    """Reward from `AutoModelForSequenceClassification`."""

    model: str
    """Hub id, local folder, or `embedded:NAME`."""

    revision: str | None = None
    """Git revision of a Hub model."""

    label: int | str | None = None
    """Which of several labels the reward is about: its index or its name in the model's configuration. None: the model has one logit."""

    label_score: Literal["log_odds", "logit"] | None = None
    """Reward from the label. `log_odds` (taken when None): log p / (1 - p) under the softmax over all, for labels of which one is true.
    `logit`: as it is, for independent heads, such as those of a multi-objective reward model."""

    max_length: int | None = Field(None, ge=8)
    """Most tokens of prompt and answer together; None takes the model's own limit. A longer text has no reward
    (missing, with the reason), it is never cut."""

    max_batch_tokens: int = Field(8192, ge=64)
    """Padded tokens per forward pass; fewer for a while after memory ran out."""

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

    def models(self) -> dict[str, tuple[str, str | None]]:
        """Name and revision of each model it loads, by field."""
        return {"model": (self.model, self.revision)}


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

    pool: PoolConfig = deployment(PoolConfig())
    """This objective's actor pool."""

    def models(self) -> dict[str, tuple[str, str | None]]:
        """See `ClassifierReward.models`."""
        return {"policy": (self.policy, self.policy_revision), "reference": (self.reference, self.reference_revision)}


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

    def models(self) -> dict[str, tuple[str, str | None]]:
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

    def models(self) -> dict[str, tuple[str, str | None]]:
        """None that is known."""
        return {}


class ServiceReward(Section):
    """What rewards from a service have in common."""

    url: str
    """`https://...`; `http://...` for what sends no token."""

    token_env: str | None = deployment(None)
    """Environment variable, on every node, with the token that is sent as `Authorization: Bearer ...`. The token itself belongs
    nowhere in a configuration."""

    ca_file: str | None = deployment(None)
    """Certificates to trust instead of the usual ones, e.g. of a company. The server's certificate is always checked."""

    num_connections: int = deployment(4, ge=1)
    """Requests at the same time, of each actor."""

    timeout_s: float = deployment(60.0, gt=0)
    """Longest wait for a connection, and for each part of an answer."""

    max_retries: int = deployment(5, ge=0)
    """How often a request is repeated after a failed connection, a timeout, or status 429, 500, 502, 503 or 504; the wait doubles from a
    second on, or is what `Retry-After` says. After the last one the scores of its answers are missing."""

    pool: PoolConfig = deployment(PoolConfig())
    """This objective's actor pool."""

    @model_validator(mode="after")
    def _safe(self) -> ServiceReward:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must begin with https:// or http:// and name a host")
        if parts.username or parts.password:
            raise ValueError(
                "url holds a user name or password; put the token into an environment variable and name that in token_env"
            )
        if self.token_env is not None and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError("url begins with http://, so the token of token_env could be read on its way; use https://")
        return self

    def models(self) -> dict[str, tuple[str, str | None]]:
        """None that is loaded here."""
        return {}


class HttpReward(ServiceReward):
    """A service that scores answers: JSON in and out.

    Sent is `{"items": [{"prompt": [{"role", "content"}, ...], "answer": "..."}, ...]}`; expected is `{"scores": [1.5, null, ...]}`, one number
    per item, or null where there is none.
    """

    kind: Literal["http"]
    """Reward from a POST request per batch."""

    batch_size: int = deployment(32, ge=1)
    """Answers per request."""


class JudgeReward(ServiceReward):
    """A language model that judges each answer by a criterion, behind an OpenAI-compatible endpoint."""

    kind: Literal["judge"]
    """Reward from a chat completion per answer; `url` is that of the completions, e.g. `https://host/v1/chat/completions`."""

    model: str
    """Name of the model at the endpoint."""

    criterion: str = Field(min_length=1)
    """What a good answer is, in a sentence or a whole rubric, e.g. `The answer is truthful, and says so where it does not know.`"""

    method: Literal["score", "yes"] = "score"
    """`score`: a whole number on a scale, as JSON by a schema. `yes`: log p(yes) - log p(no) of the reply's first token, which is finer."""

    lowest: int = 1
    """Lowest score."""

    highest: int = 10
    """Highest score."""

    max_tokens: int = Field(64, ge=1)
    """Most tokens of a reply with a score; a longer one is cut, and its score missing."""

    @model_validator(mode="after")
    def _scale(self) -> JudgeReward:
        if self.highest <= self.lowest:
            raise ValueError(f"highest ({self.highest}) must be above lowest ({self.lowest})")
        return self


RewardConfig = Annotated[
    ClassifierReward | CustomReward | HttpReward | ImplicitReward | JudgeReward | RuleReward, Field(discriminator="kind")
]
