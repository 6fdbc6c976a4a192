"""A vLLM engine in a thread of ours: groups join while others decode, so the engine does not drain between blocks.

`submit` may be called from many threads; each group is one request with `n` candidates and comes back whole. The thread owns
the engine: nothing else touches it. Invariant: every submitted group ends with N candidates or with an error; when the
engine dies, all groups in flight get that error.

A group begins with the first token of its first candidate, which is when the engine has a place for it, not when it is submitted.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

from rc_ray.config import GenerationConfig
from rc_ray.generation.arguments import check_engine_arguments, lora_arguments
from rc_ray.generation.hardware import alone_on_gpu, engine_choices
from rc_ray.generation.load import Load


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


def hide_llvmlite() -> None:
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


class GroupTimedOut(RuntimeError):
    """A group took longer than `generation.group_timeout_s`."""


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
        gpu_share: float = 1.0,
        across_nodes: bool = False,
    ) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        check_engine_arguments(config.engine)
        choices = engine_choices(config.engine, config.max_model_len, on_gpu, gpu_share, across_nodes)
        arguments: dict[str, Any] = (
            {"disable_log_stats": True} | {name: value for name, (value, _) in choices.items()} | config.engine
        )
        if adapters:
            from vllm.lora.request import LoRARequest

            arguments |= lora_arguments(adapters, config.engine, with_base, on_gpu)
            self._adapters = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(adapters.items(), 1)}
        else:  # options for the adapters of another policy's engine
            arguments = {name: value for name, value in arguments.items() if "lora" not in name}
        self._config = config
        hide_llvmlite()
        engine_arguments = EngineArgs(
            model=model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=config.max_model_len,
            seed=0,
            **arguments,
        )
        self._queue: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._in_flight: dict[str, _Request] = {}
        self._died: EngineDied | None = None
        self._load, self._load_lock = Load(), threading.Lock()
        loaded: Future[None] = Future()

        def own() -> None:
            # Loaded in the thread that steps it: each thread that computes has OpenMP threads of its own, and with more of them than
            # cores OpenMP sleeps between operations instead of spinning, which takes a third of the speed of a small model.
            try:
                with alone_on_gpu(on_gpu, gpu_share):
                    self._engine = LLMEngine.from_engine_args(engine_arguments)
            except BaseException as error:
                loaded.set_exception(error)
                return
            loaded.set_result(None)
            self._loop()

        threading.Thread(target=own, name="vllm-engine", daemon=True).start()
        loaded.result()
        threading.Thread(target=self._watch, name="vllm-engine-watch", daemon=True).start()

    def submit(
        self, prompt_ids: list[int], seed: int, num_candidates: int, adapter: str | None = None
    ) -> Future[list[Candidate]]:
        """Queues one group; candidate i is sampled with seed + i, with the adapter of that name.

        Returns:
            A future of N candidates in index order. It raises `EngineDied` when the engine is gone and vLLM's own error when the
            request was refused.
        """
        future: Future[list[Candidate]] = Future()
        self._queue.put(_Request(prompt_ids, seed, num_candidates, adapter, future))
        if self._died is not None:
            self._end(self._died)
        return future

    def take_load(self) -> Load:
        """The load since it was taken last."""
        with self._load_lock:
            load, self._load = self._load, Load()
        return load

    def _loop(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        in_flight = self._in_flight
        # Groups without a token yet -> vLLM's id of their first candidate, in the order of submission.
        waiting: dict[str, str] = {}
        begun_s: dict[str, float] = {}  # in the order in which they began
        number = most = 0
        seen_s = time.monotonic()
        try:
            while True:
                # Wait only when nothing decodes; otherwise take what has arrived and go on stepping.
                while not in_flight or not self._queue.empty():
                    request = self._queue.get()
                    if not in_flight:
                        idle_s, seen_s = time.monotonic() - seen_s, time.monotonic()
                        with self._load_lock:
                            self._load.add_time(idle_s, 0, most)
                    number += 1
                    in_flight[str(number)] = request
                    try:
                        waiting[str(number)] = self._add(str(number), request)
                    except EngineDeadError:
                        raise
                    except Exception as error:  # vLLM refuses this one request; the others go on
                        del in_flight[str(number)]
                        request.future.set_exception(self._died or error)
                held, most = len(in_flight), max(most, len(in_flight))
                finished = [output for output in self._engine.step() if output.finished]
                now = time.monotonic()
                while waiting:
                    name, first = next(iter(waiting.items()))
                    state = self._engine.output_processor.request_states.get(first)
                    if state is not None and state.is_prefilling:
                        break  # vLLM begins them in this order, unless adapters wait for room
                    begun_s[name] = now
                    del waiting[name]
                for output in finished:
                    begun_s.setdefault(output.request_id, now)
                    waiting.pop(output.request_id, None)
                with self._load_lock:
                    self._load.add_time(now - seen_s, held, most)
                    for output in finished:
                        self._load.add_group(now - begun_s[output.request_id])
                seen_s = now
                for output in finished:
                    del begun_s[output.request_id]
                    candidates = self._candidates(output, in_flight[output.request_id])
                    in_flight.pop(output.request_id).future.set_result(candidates)
                self._give_up(in_flight, begun_s, now)
        except BaseException as error:
            self._end(EngineDied(f"{type(error).__name__}: {error}"))

    def _watch(self) -> None:
        """Sees the end of an engine that has a process of its own; vLLM's `step` would wait for it for ever."""
        resources = getattr(self._engine.engine_core, "resources", None)
        while resources is not None and self._died is None:
            if resources.engine_dead:
                self._end(EngineDied("its process is gone"))
            time.sleep(1)

    def _end(self, error: EngineDied) -> None:
        """Gives the error to everybody who waits, now and from now on."""
        self._died = error
        requests = list(self._in_flight.values())
        with contextlib.suppress(queue.Empty):
            while True:
                requests.append(self._queue.get_nowait())
        for request in requests:
            with contextlib.suppress(InvalidStateError):  # it has its answer
                request.future.set_exception(error)

    def _give_up(self, in_flight: dict[str, _Request], begun_s: dict[str, float], now: float) -> None:
        """Aborts the groups that have taken too long."""
        limit = self._config.group_timeout_s
        if limit is None:
            return
        for name, begun in list(begun_s.items()):
            if now - begun < limit:
                break
            self._engine.abort_request([name])
            with self._load_lock:
                self._load.add_group(now - begun_s.pop(name))
            in_flight.pop(name).future.set_exception(
                GroupTimedOut(f"not finished within generation.group_timeout_s = {limit:g}")
            )

    def _add(self, name: str, request: _Request) -> str:
        """Hands a group to vLLM; returns vLLM's id of its first candidate."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        identity = self._engine.add_request(
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
                flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
            lora_request=None if request.adapter is None else self._adapters[request.adapter],
        )
        number = request.num_candidates
        names = [identity] if number == 1 else [f"{i}_{identity}" for i in range(number)]
        for each in names:
            # It would decode every token once more, by itself, for a table that nobody reads; the sum is kept without it.
            self._engine.output_processor.request_states[each].logprobs_processor.tokenizer = None
        return names[0]

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
