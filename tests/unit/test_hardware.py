"""The environment of processes in which a policy computes on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys

from rc_ray.generation.hardware import cpu_runtime_env

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
