"""The vLLM engine in the processes that Ray may put it into."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def run(code: str, policy: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code, str(policy)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_it_starts_after_numba_was_used_and_later_candidates_equal_those_of_one_request(tiny_policy: Path) -> None:
    run(AFTER_NUMBA, tiny_policy)


def test_a_group_that_takes_too_long_is_given_up_and_the_others_go_on(tiny_policy: Path) -> None:
    run(LIMITED, tiny_policy)
