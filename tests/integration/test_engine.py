"""The vLLM engine in the processes that Ray may put it into."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

AFTER_NUMBA = """
import os, sys
from rc_ray.generation.hardware import cpu_engine_environment
os.environ.update(cpu_engine_environment(1)[0])
import numpy as np
from rc_ray.core.rule import consistency_matrix
assert consistency_matrix(np.eye(2, dtype=np.float32)).sum() == 0
from rc_ray.config import GenerationConfig
from rc_ray.generation.engine import SamplingEngine
engine = SamplingEngine(sys.argv[1], GenerationConfig(max_tokens=8, max_model_len=128), "float32", on_gpu=False)
whole = engine.submit([5, 6, 7], 11, 4).result()
rest = engine.submit([5, 6, 7], 11 + 1, 3).result()
assert [c.token_ids for c in whole[1:]] == [c.token_ids for c in rest]
assert [c.seed for c in rest] == [12, 13, 14]
"""


LIMITED = """
import os, sys, time
from rc_ray.generation.hardware import cpu_engine_environment
os.environ.update(cpu_engine_environment(1)[0])
from rc_ray.config import GenerationConfig
from rc_ray.generation.engine import GroupTimedOut, SamplingEngine
config = GenerationConfig(max_tokens=16, max_model_len=128, group_timeout_s=4.0, engine={"max_num_seqs": 8})
engine = SamplingEngine(sys.argv[1], config, "float32", on_gpu=False)
before = engine.submit([5, 6, 7], 11, 4).result()
started = time.monotonic()
huge = engine.submit([8, 9], 0, 4000)  # two hundred and more times as long as the others
small = [engine.submit([5, 6, 7], 11, 4), engine.submit([9, 9], 5, 1)]
try:
    huge.result()
    raise SystemExit("it was not given up")
except GroupTimedOut as error:
    assert str(error) == "not finished within generation.group_timeout_s = 4", error
assert 4 <= time.monotonic() - started < 60
# These waited for a place longer than the limit, which does not count; nothing of the first one is left.
assert [c.token_ids for c in small[0].result()] == [c.token_ids for c in before]
assert len(small[1].result()) == 1
assert time.monotonic() - started > 4
assert not engine._engine.has_unfinished_requests()
load = engine.take_load()
assert sum(load.counts.values()) == 4, load
assert 4 <= load.longest_s < 60 and load.quantile_s(0.5) < 4, load
assert 4 < load.engine_s and load.thin_s <= load.engine_s, load
assert engine.take_load().counts == {}
"""


APART = """
import json, os, signal, sys
import psutil
from rc_ray.generation.hardware import cpu_engine_environment
os.environ.update(cpu_engine_environment(1)[0] | {"VLLM_ENABLE_V1_MULTIPROCESSING": sys.argv[2]})
from rc_ray.config import GenerationConfig
from rc_ray.generation.engine import EngineDied, SamplingEngine
engine = SamplingEngine(sys.argv[1], GenerationConfig(max_tokens=64, max_model_len=128), "float32", on_gpu=False)
groups = [engine.submit([5, 6, 7 + i], 11, 4) for i in range(8)]
found = [[(c.text, c.token_ids, c.seed, round(c.logprob, 3)) for c in group.result()] for group in groups]
if sys.argv[2] == "1":
    core, = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name()]
    pending = [engine.submit([5, 6, 7], 11, 400)] if sys.argv[3] == "busy" else []
    core.send_signal(signal.SIGKILL)
    while not pending and not engine._engine.engine_core.resources.engine_dead:
        pass  # vLLM knows before our own look at it, and refuses
    for future in (*pending, engine.submit([5, 6, 7], 11, 4)):
        try:
            future.result(timeout=120)
            raise SystemExit("it answered after its death")
        except EngineDied:
            pass
print(json.dumps(found), flush=True)
os._exit(0)
"""


def run(code: str, policy: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", code, str(policy), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_starts_after_numba_was_used_and_later_candidates_equal_those_of_one_request(tiny_policy: Path) -> None:
    run(AFTER_NUMBA, tiny_policy)


def test_a_group_that_takes_too_long_is_given_up_and_the_others_go_on(tiny_policy: Path) -> None:
    run(LIMITED, tiny_policy)


def test_an_engine_in_a_process_of_its_own_as_on_gpus_gives_the_same_and_its_death_is_seen(tiny_policy: Path) -> None:
    inside, apart = (json.loads(run(APART, tiny_policy, how, "busy").splitlines()[-1]) for how in "01")
    assert [[c[:3] for c in group] for group in apart] == [[c[:3] for c in group] for group in inside]
    logprobs = [[c[3] for group in run for c in group] for run in (apart, inside)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=0.01)


def test_a_group_that_comes_just_after_the_end_of_an_idle_engine_is_not_blamed(tiny_policy: Path) -> None:
    run(APART, tiny_policy, "1", "idle")
