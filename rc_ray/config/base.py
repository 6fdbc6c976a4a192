"""What all configuration sections share."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")
# Objectives give names to pools and, as `score_<objective>`, to stages; these are others' names there.
RESERVED_NAMES = frozenset({"generation", "before", "after"})

# Parameters of a URL that are no setting.
SECRET_PARAMETER = re.compile(r"(key|token|secret|password|signature)$|^(code|sig|auth|pwd)$", re.IGNORECASE)
# vLLM's names for how many devices share one engine.
PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")
# vLLM's names for how much an engine works on at the same time, and where: like the size of a pool, no part of what is asked for.
CAPACITY = (
    *PARALLEL_SIZES, "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size", "max_num_seqs", "max_num_batched_tokens",
    "enable_prefix_caching", "enable_chunked_prefill", "cpu_offload_gb", "distributed_executor_backend", "max_parallel_loading_workers", "enforce_eager",
    "disable_log_stats",
)  # fmt: skip


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys forbidden, descriptions taken from the docstrings under the fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,  # a key that Python reserves has another name as an attribute
    )


def deployment(default: Any = ..., **kwargs: Any) -> Any:
    """A field that says where and how fast a run goes, not what comes out: left out of the run's fingerprint."""
    return Field(default, json_schema_extra={"affects_results": False}, **kwargs)


def secret_parameter(query: str) -> str | None:
    """The first parameter in the query of a URL that looks like a key, or None."""
    return next((name for name, _ in parse_qsl(query, keep_blank_values=True) if SECRET_PARAMETER.search(name)), None)


def engine_arguments() -> Any:
    """A field of vLLM's engine arguments, of which those of `CAPACITY` are left out of the run's fingerprint."""
    return Field({}, json_schema_extra={"no_result": list(CAPACITY)})


class PoolConfig(Section):
    """One Ray Data actor pool, of fixed size unless `max_size` is given."""

    size: int = Field(1, ge=1)
    """Number of actors: always, or with `max_size` at least and to begin with."""

    max_size: int | None = Field(None, ge=2)
    """For clusters that grow with the work: actors are added while blocks wait, up to so many. None: always `size`."""

    num_cpus: float | None = Field(None, gt=0)
    """Ray CPUs reserved per actor. None: chosen by the planner, with the reason printed."""

    num_gpus: float | None = Field(None, ge=0)
    """Ray GPUs reserved per actor. None: tensor x pipeline parallel size for generation and 1 for a reward model when the
    cluster has GPUs, otherwise 0. Fractions put several actors on one GPU."""

    @model_validator(mode="after")
    def _possible(self) -> PoolConfig:
        if self.max_size is not None and self.max_size <= self.size:
            raise ValueError(
                f"max_size ({self.max_size}) has no effect unless it is above size ({self.size}), with which the pool begins; raise or remove it"
            )
        if self.num_gpus is not None and self.num_gpus > 1 and not self.num_gpus.is_integer():
            raise ValueError(
                f"num_gpus ({self.num_gpus:g}) must be a whole number above 1: Ray has no fractions of several GPUs"
            )
        return self
