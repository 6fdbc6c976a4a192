"""The engine's loop, with vLLM's part scripted: groups that end in another order than they came in."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from rc_ray.generation.engine import EngineDied, SamplingEngine, _Request
from rc_ray.generation.load import Load


def test_a_later_group_may_be_finished_while_an_earlier_one_waits_for_room(monkeypatch: Any) -> None:
    """As vLLM does with more adapters than `max_loras`."""
    prefilling = {"1": True, "2": True}
    steps = iter([["2"], ["1"]])

    def step() -> list[Any]:
        found = [SimpleNamespace(request_id=name, finished=True) for name in next(steps)]
        for output in found:
            del prefilling[output.request_id]
        return found

    class States:
        @staticmethod
        def get(name: str) -> Any:
            return SimpleNamespace(is_prefilling=prefilling[name]) if name in prefilling else None

    engine: Any = object.__new__(SamplingEngine)
    engine._queue, engine._in_flight, engine._died = queue.SimpleQueue(), {}, None
    engine._load, engine._load_lock = Load(), threading.Lock()
    engine._config = SimpleNamespace(group_timeout_s=None)
    engine._engine = SimpleNamespace(step=step, output_processor=SimpleNamespace(request_states=States))
    monkeypatch.setattr(SamplingEngine, "_add", lambda self, name, request: name)
    monkeypatch.setattr(SamplingEngine, "_candidates", lambda self, output, request: [output.request_id])
    futures: list[Future[Any]] = [Future(), Future()]
    for future in futures:
        engine._queue.put(_Request([1], 0, 1, None, future))
    threading.Thread(target=engine._loop, daemon=True).start()
    assert [future.result(timeout=10) for future in futures] == [["1"], ["2"]]
    assert not isinstance(engine._died, EngineDied)
