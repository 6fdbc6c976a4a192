"""Questions to a chat model, wherever it runs: conversations in, a reply to each out.

`EndpointChat` asks an OpenAI-compatible endpoint; `chat_engine.EngineChat` a vLLM engine in this process. Decoding is greedy. Invariant:
every question gets a reply, in order; one that could not be answered says why and holds nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rc_ray.config import JudgeReward
from rc_ray.core.ids import Message
from rc_ray.rewards.service import FIRST_WAIT_S, Service, ServiceError


@dataclass(frozen=True)
class Wanted:
    """What is asked for."""

    max_tokens: int
    """Of a reply; a longer one is cut."""

    schema: dict[str, Any] | None = None
    """JSON schema that the reply is to follow."""

    num_first_tokens: int = 0
    """How many of the likeliest first tokens are to come with their log-probs."""


@dataclass(frozen=True)
class Reply:
    """What a model replied, or why there is nothing."""

    text: Any = None
    """A string, unless the endpoint sends something else."""

    is_cut: bool = False
    """Whether it ended at `max_tokens`."""

    first_tokens: tuple[tuple[str, float], ...] = ()
    """The likeliest first tokens and their log-probs, in nats."""

    error: str = ""


class ChatModel(Protocol):
    """Answers questions."""

    @property
    def num_requests(self) -> int:
        """Questions that have ended, with a reply or without one."""

    def ask(self, questions: list[list[Message]], wanted: Wanted) -> list[Reply]:
        """One reply per question."""


class EndpointChat:
    """A model behind an OpenAI-compatible endpoint. See `Service` for the arguments and errors."""

    def __init__(self, config: JudgeReward, first_wait_s: float = FIRST_WAIT_S) -> None:
        self._service = Service(config, first_wait_s)
        self._model = config.model

    @property
    def num_requests(self) -> int:
        """See `ChatModel`."""
        return self._service.num_requests

    def ask(self, questions: list[list[Message]], wanted: Wanted) -> list[Reply]:
        """See `ChatModel.ask`."""
        options: dict[str, Any] = {"model": self._model, "temperature": 0, "seed": 0, "max_tokens": wanted.max_tokens}
        if wanted.schema is not None:
            schema = {"name": "judgement", "schema": wanted.schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        if wanted.num_first_tokens:
            options |= {"logprobs": True, "top_logprobs": wanted.num_first_tokens}
        return self._service.map(lambda question: self._ask({**options, "messages": question}), questions)

    def _ask(self, request: dict[str, Any]) -> Reply:
        try:
            choice = self._service.ask(request)["choices"][0]
            tokens = choice["logprobs"]["content"][0]["top_logprobs"] if request.get("logprobs") else []
            return Reply(
                choice["message"]["content"],
                choice.get("finish_reason") == "length",
                tuple((str(each["token"]), float(each["logprob"])) for each in tokens),
            )
        except ServiceError as error:
            return Reply(error=str(error))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            return Reply(error=f"{self._service.url}: the reply is no chat completion as asked for")
