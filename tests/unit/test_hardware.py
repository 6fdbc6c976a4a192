"""What engines on one machine share: the memory of processes that compute on CPUs, and a GPU while they load."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from rc_ray.errors import ConfigError
from rc_ray.generation.hardware import alone_on_gpu, cpu_engine_environment, cpu_runtime_env, num_cores

PROGRAM = """
import ctypes, resource
memory = ctypes.CDLL(None)
memory.malloc.restype = ctypes.c_void_p

def work():
    for mib in (160, 72, 120):
        block = ctypes.c_void_p(memory.malloc(mib << 20))
        ctypes.memset(block, 1, mib << 20)
        memory.free(block)

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(environment: dict[str, str]) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    return int(ran.stdout)


def test_freed_memory_is_taken_again_without_page_faults() -> None:
    assert page_faults({}) > 10_000
    assert page_faults(cpu_runtime_env()["env_vars"]) < 100


def test_cores_can_be_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RC_RAY_FREE_CORES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert num_cores() == 8
    monkeypatch.setenv("RC_RAY_FREE_CORES", "2")
    assert num_cores() == 6
    assert cpu_engine_environment(2)[0]["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("RC_RAY_FREE_CORES", "8")
    assert num_cores() == 1
    monkeypatch.setenv("RC_RAY_FREE_CORES", "-1")
    with pytest.raises(ConfigError, match="RC_RAY_FREE_CORES = '-1' is no number of cores; set how many"):
        num_cores()


@pytest.mark.parametrize(
    ("on_gpu", "share", "gpu", "waits"),
    [(True, 0.5, "0", True), (True, 0.5, "1", False), (True, 1.0, "0", False), (False, 0.5, "0", False)],
    ids=["the same GPU", "another GPU", "whole GPUs", "CPU"],
)
def test_engines_that_share_a_gpu_load_one_after_the_other(
    on_gpu: bool, share: float, gpu: str, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = threading.Event()

    def load() -> None:
        with alone_on_gpu(on_gpu, share):
            loaded.set()

    other = threading.Thread(target=load)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with alone_on_gpu(on_gpu=True, gpu_share=0.5):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu)
        other.start()
        assert loaded.wait(timeout=0.3 if waits else 30) is not waits
    assert loaded.wait(timeout=30)
    other.join()


def test_an_engine_that_was_forked_off_while_loading_does_not_keep_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with alone_on_gpu(on_gpu=True, gpu_share=0.5):
        engine = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        engine.start()
    loaded = threading.Event()

    def load() -> None:
        with alone_on_gpu(on_gpu=True, gpu_share=0.5):
            loaded.set()

    threading.Thread(target=load, daemon=True).start()
    found = loaded.wait(timeout=30)
    engine.kill()
    assert found
