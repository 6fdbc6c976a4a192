"""A vLLM engine in a thread of ours: groups join while others decode, so the engine does not drain between blocks.

`submit` may be called from many threads; each group is one request with `n` candidates and comes back whole. The thread owns
the engine: nothing else touches it. Invariant: every submitted group ends with N candidates or with an error; when the
engine dies, all groups in flight get that error.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rc_ray.config import GenerationConfig
from rc_ray.generation.arguments import check_engine_arguments, lora_arguments


@dataclass(frozen=True)
class Candidate:
    """One sampled answer. `token_ids` includes the end token; `logprob` is summed over `token_ids`, in nats."""

    text: str
    token_ids: list[int]
    finish_reason: str
    seed: int
    logprob: float


@dataclass(frozen=True)
class _Request:
    prompt_ids: list[int]
    seed: int
    num_candidates: int
    adapter: str | None
    future: Future[list[Candidate]]


def _hide_llvmlite() -> None:
    """Makes llvmlite's library wrapper deny attributes such as `__dict__`, as other objects without them do.

    vLLM's CPU platform looks at every object of every loaded module, and this one answers to any name, which ends the engine's
    start in any process that has used Numba before, such as a Ray worker that has selected pairs.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    wrapper = getattr(ffi, "_lib_wrapper", None)
    if wrapper is None or getattr(wrapper.__getattr__, "denies_special_names", False):
        return
    found = wrapper.__getattr__

    def lookup(self: Any, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return found(self, name)

    lookup.denies_special_names = True  # type: ignore[attr-defined]
    wrapper.__getattr__ = lookup


class EngineDied(RuntimeError):
    """The engine cannot go on; its process must be replaced."""


class SamplingEngine:
    """Samples N candidates per prompt with one vLLM engine.

    Environment variables that vLLM reads (see `hardware.cpu_engine_environment`) must be set before.

    Args:
        adapters: folders of LoRA adapters by the name that `submit` takes.
        with_base: whether there are requests without an adapter beside them.
    """

    def __init__(
        self,
        model: str,
        config: GenerationConfig,
        dtype: str,
        on_gpu: bool,
        revision: str | None = None,
        trust_remote_code: bool = False,
        adapters: Mapping[str, str] | None = None,
        with_base: bool = True,
    ) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments: dict[str, Any] = {
            "enable_prefix_caching": True,
            "max_num_seqs": 256 if on_gpu else 32,
            "disable_log_stats": True,
        }
        if not on_gpu:
            # Compilation costs minutes and gains nothing here; seeded requests that are prefilled in chunks kill the CPU engine.
            arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
        check_engine_arguments(config.engine)
        arguments |= config.engine
        if adapters:
            from vllm.lora.request import LoRARequest

            arguments |= lora_arguments(adapters, config.engine, with_base, on_gpu)
            self._adapters = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(adapters.items(), 1)}
        else:  # options for the adapters of another policy's engine
            arguments = {name: value for name, value in arguments.items() if "lora" not in name}
        arguments.setdefault("max_num_batched_tokens", max(config.max_model_len, 4096))
        self._config = config
        _hide_llvmlite()
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype,  # type: ignore[arg-type]
                max_model_len=config.max_model_len,
                seed=0,
                **arguments,
            )
        )
        self._queue: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._on_tokens: Callable[[int], None] | None = None
        self._died: BaseException | None = None
        threading.Thread(target=self._loop, name="vllm-engine", daemon=True).start()

    def submit(
        self, prompt_ids: list[int], seed: int, num_candidates: int, adapter: str | None = None
    ) -> Future[list[Candidate]]:
        """Queues one group; candidate i is sampled with seed + i, with the adapter of that name.

        Returns:
            A future of N candidates in index order. It raises `EngineDied` when the engine is gone and vLLM's own error when the
            request was refused.
        """
        future: Future[list[Candidate]] = Future()
        if self._died is not None:
            future.set_exception(EngineDied(str(self._died)))
        else:
            self._queue.put(_Request(prompt_ids, seed, num_candidates, adapter, future))
        return future

    def _loop(self) -> None:
        in_flight: dict[str, _Request] = {}
        number = 0
        try:
            while True:
                # Wait only when nothing decodes; otherwise take what has arrived and go on stepping.
                while not in_flight or not self._queue.empty():
                    request = self._queue.get()
                    number += 1
                    try:
                        in_flight[self._add(str(number), request)] = request
                    except Exception as error:  # vLLM refuses this one request; the others go on
                        request.future.set_exception(error)
                for output in self._engine.step():
                    if output.finished:
                        done = in_flight.pop(output.request_id)
                        done.future.set_result(self._candidates(output, done))
        except BaseException as error:
            self._died = error
            for request in in_flight.values():
                request.future.set_exception(EngineDied(f"{type(error).__name__}: {error}"))
            while not self._queue.empty():
                self._queue.get().future.set_exception(EngineDied(f"{type(error).__name__}: {error}"))

    def _add(self, name: str, request: _Request) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._engine.add_request(
            name,
            {"prompt_token_ids": request.prompt_ids},
            SamplingParams(
                n=request.num_candidates,
                seed=request.seed,
                temperature=self._config.temperature,
                top_p=self._config.top_p,
                top_k=self._config.top_k,
                max_tokens=self._config.max_tokens,
                stop=list(self._config.stop),
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
            lora_request=None if request.adapter is None else self._adapters[request.adapter],
        )
        return name

    def _candidates(self, output: Any, request: _Request) -> list[Candidate]:
        outputs = sorted(output.outputs, key=lambda o: o.index)
        if [o.index for o in outputs] != list(range(request.num_candidates)):
            raise EngineDied(f"vLLM returned candidates {[o.index for o in outputs]} of {request.num_candidates}")
        return [
            Candidate(
                text=o.text,
                token_ids=list(o.token_ids),
                finish_reason=str(o.finish_reason),
                seed=request.seed + o.index,
                logprob=float(o.cumulative_logprob),
            )
            for o in outputs
        ]
