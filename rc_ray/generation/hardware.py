"""Choices that depend on the machine, each returned with its reason. Reads the machine, imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_flags() -> set[str]:
    """Instruction sets of this CPU as the kernel lists them; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def choose_dtype(requested: str, on_gpu: bool) -> tuple[str, str]:
    """(dtype, reason) for inference."""
    if requested != "auto":
        return requested, "set in the configuration"
    if on_gpu:
        return "bfloat16", "GPU"
    if "avx512_bf16" in cpu_flags():
        return "bfloat16", "CPU with AVX-512 BF16"
    return "float32", "CPU without AVX-512 BF16, where bfloat16 is several times slower"


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_engine_environment(num_engines: int) -> tuple[dict[str, str], str]:
    """(environment, reason) for a vLLM engine on a CPU host that `num_engines` engines may share.

    The defaults of vLLM bind each thread to one core and leave a core to the serving process, which costs a third of the
    throughput on small hosts and puts several engines onto the same cores. In-process execution saves a second process.
    """
    threads = max(1, num_cores() // num_engines)
    return (
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "OMP_NUM_THREADS": str(threads),
        },
        f"{threads} unbound threads ({num_cores()} cores, {num_engines} engine(s)), engine inside the actor, 1 GiB KV cache "
        "unless VLLM_CPU_KVCACHE_SPACE says otherwise",
    )
