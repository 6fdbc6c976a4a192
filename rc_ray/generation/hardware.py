"""Choices that depend on the machine, each returned with its reason. Reads the machine, imports nothing heavy."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rc_ray.errors import ConfigError

# Most texts that an engine without sampling reads in one step; the limit is meant to be that of tokens.
MAX_TEXTS = 256
# The part of its share of a GPU's memory that an engine takes; the rest is for CUDA itself. vLLM takes about as much of a whole GPU.
GPU_MEMORY_SHARE = 0.9
# For processes in which policies compute on CPUs; read when they start. glibc would map every block of more than 32 MiB, such as activations,
# gradients and logits, anew and give it back at once, and more so in threads, so that the kernel clears each of its pages at every use. Kept instead,
# SmolLM2-135M was trained 1.1 to 1.6 times as fast on two cores, and sampled up to 1.1 times. Rewards gain nothing: their batches are smaller.
# PyTorch's huge pages for large tensors leave fewer gaps between what is kept: a training took 1 GiB of 8 less, and was no slower.
KEPT_MEMORY = MappingProxyType({
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "THP_MEM_ALLOC_ENABLE": "1",
})  # fmt: skip


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
    """Cores to compute on: those that this process may use but `RC_RAY_FREE_CORES`, which are left to Ray's own and other processes; at
    least one.

    Raises:
        ConfigError: that variable is no number.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = os.environ.get("RC_RAY_FREE_CORES", "0")
    if not free.isdecimal():
        raise ConfigError(
            f"RC_RAY_FREE_CORES = {free!r} is no number of cores; set how many of this host are to be left free, or unset it"
        )
    return max(1, cores - int(free))


def cpu_engine_environment(num_engines: int, given: Mapping[str, Any] = MappingProxyType({})) -> tuple[dict[str, str], str]:
    """(environment, reason) for a vLLM engine on a CPU host that `num_engines` engines may share.

    The defaults of vLLM bind each thread to one core and leave a core to the serving process, which costs a third of the
    throughput on small hosts and puts several engines onto the same cores. In-process execution saves a second process.

    Args:
        num_engines: on the host.
        given: the user's engine arguments. Unless they ask for compilation nothing is compiled: vLLM would still compile the function
            that ranks log-probs.
    """
    threads = max(1, num_cores() // num_engines)
    return (
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "OMP_NUM_THREADS": str(threads),
        }
        | ({"TORCHDYNAMO_DISABLE": "1"} if given.get("enforce_eager", True) else {}),
        f"{num_cores()} cores for {num_engines} engine(s); threads bound by vLLM leave a core unused, 65 instead of 107 tok/s on two cores; the "
        "engine inside the actor is 1.2 times as fast there; compiling takes seconds at the start and gains nothing; KV cache in GiB, set the "
        "variable for another",
    )


def cpu_runtime_env() -> dict[str, dict[str, str]]:
    """Ray's `runtime_env` for a process in which a policy computes on CPUs. What the user has set of it counts."""
    return {"env_vars": {name: os.environ.get(name, value) for name, value in KEPT_MEMORY.items()}}


def engine_choices(
    given: Mapping[str, Any], max_model_len: int, on_gpu: bool, gpu_share: float = 1.0, across_nodes: bool = False
) -> dict[str, tuple[Any, str]]:
    """vLLM engine arguments that are chosen here unless given: name -> (value, reason).

    Args:
        given: the user's engine arguments.
        max_model_len: tokens.
        gpu_share: what one engine gets of a GPU; from 1 on, whole ones.
        across_nodes: whether the devices of one engine are on several nodes.
    """
    chosen: dict[str, tuple[Any, str]] = {
        "enable_prefix_caching": (True, "the candidates of a group share their prompt"),
        "max_num_seqs": (256, "GPU") if on_gpu else (32, "CPU, which few sequences keep busy"),
        "max_num_batched_tokens": (max(max_model_len, 4096), "holds any prompt whole"),
    }
    if not on_gpu:
        chosen["enforce_eager"] = True, "on CPUs compilation takes minutes and gains nothing"
        chosen["enable_chunked_prefill"] = False, "seeded requests that are prefilled in chunks kill vLLM's CPU engine"
    elif gpu_share < 1 and "kv_cache_memory_bytes" not in given:
        share = math.floor(GPU_MEMORY_SHARE * gpu_share * 1000) / 1000
        chosen["gpu_memory_utilization"] = share, f"{GPU_MEMORY_SHARE:g} of the {gpu_share:g} GPU that the engine has"
    if across_nodes:
        chosen["distributed_executor_backend"] = "ray", "the engine's GPUs are on several nodes"
    elif on_gpu and gpu_share > 1:
        chosen["distributed_executor_backend"] = "mp", "the engine's GPUs are on one node"
    return {name: choice for name, choice in chosen.items() if name not in given}


@contextlib.contextmanager
def alone_on_gpu(on_gpu: bool, gpu_share: float) -> Iterator[None]:
    """Lets vLLM engines that share a GPU load one after the other.

    While it loads, an engine measures how much of the whole device fills, and takes what others fill meanwhile for its own.

    Args:
        gpu_share: what the engine gets of a GPU; from 1 on nobody else is there.
    """
    if not on_gpu or gpu_share >= 1:
        yield
        return
    import fcntl

    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    with (Path(tempfile.gettempdir()) / f"rc_ray-{os.getuid()}-gpu-{gpu}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # an engine that was forked off meanwhile has the file, too


def scoring_environment(given: Mapping[str, Any], on_gpu: bool, num_threads: int) -> dict[str, str]:
    """Environment of a vLLM engine for rewards, which has no loop thread of ours; `given`: the user's engine arguments."""
    own = {
        # In this process on GPUs, too: vLLM waits for ever for an engine in another one that died.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if on_gpu:
        # Triton's own default, TF32, is 1e-3 off; it counts for float32 alone.
        return own | {"TRITON_F32_DEFAULT": os.environ.get("TRITON_F32_DEFAULT", "ieee")}
    return cpu_engine_environment(1, given)[0] | own | {"OMP_NUM_THREADS": str(num_threads)}


def scoring_choices(
    given: Mapping[str, Any], max_batch_tokens: int, on_gpu: bool, gpu_share: float = 1.0
) -> dict[str, tuple[Any, str]]:
    """As `engine_choices`, for an engine that reads texts and writes none.

    Args:
        max_batch_tokens: in one step; at least as many as the longest text has.
    """
    chosen = engine_choices(given, max_batch_tokens, on_gpu, gpu_share)
    # vLLM turns it on by itself for the architectures that can do it, and warns of the others.
    chosen.pop("enable_prefix_caching", None)
    ours: dict[str, tuple[Any, str]] = {
        "max_num_batched_tokens": (max_batch_tokens, "max_batch_tokens, or the longest text"),
        "max_num_seqs": (min(MAX_TEXTS, max_batch_tokens), "tokens are what limits a step"),
    }
    if not on_gpu:
        ours["block_size"] = 32, "only whole blocks are shared, and vLLM's 128 are longer than many prompts"
    return chosen | {name: choice for name, choice in ours.items() if name not in given}
