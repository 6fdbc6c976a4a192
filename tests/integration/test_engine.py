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


def test_it_starts_after_numba_was_used_and_later_candidates_equal_those_of_one_request(tiny_policy: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER_NUMBA, str(tiny_policy)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
