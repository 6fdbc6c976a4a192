"""What a run would do, without starting anything: `rc-ray plan CONFIG`.

Prints the resolved configuration, the pools with the reason for each size, prompts, tokens and a rough time. Times come from a
plain model (a share of the device's arithmetic for twice the parameters per token), printed with its assumption.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_ray.config import Config, load_config, to_yaml
from rc_ray.errors import ClusterError, DataError
from rc_ray.generation.hardware import num_cores
from rc_ray.models import embedded
from rc_ray.models.resolve import local_model
from rc_ray.pipeline import stages
from rc_ray.pipeline.cluster import local_cpus
from rc_ray.pipeline.plan import Plan, make_plan
from rc_ray.pipeline.policies import lines as policy_lines
from rc_ray.pipeline.policies import members_of
from rc_ray.pipeline.progress import duration
from rc_ray.pipeline.prompts import BadRow, read_cells, to_messages
from rc_ray.pipeline.rounds import round_config
from rc_ray.pipeline.run import ConfigSource

# Sustained floating-point operations per second that decoding reaches: measured at about 25 GFLOP/s per core (SmolLM2-135M,
# float32, 32 sequences, AVX2); a GPU is taken at 20 TFLOP/s, which a data-centre card exceeds with enough sequences.
CPU_FLOPS_PER_CORE, GPU_FLOPS = 25e9, 20e12


@dataclass(frozen=True)
class Preview:
    """A run as it would be."""

    config: Config
    plan: Plan
    num_prompts: int
    num_bad_rows: int
    max_tokens: int
    seconds: float | None
    notes: list[str]

    def lines(self) -> list[str]:
        """Human-readable."""
        c = self.config
        shown = [
            "# resolved configuration",
            *to_yaml(c).rstrip().splitlines(),
            "",
            "# pools",
            *self.plan.lines(),
            "",
            "# volume",
        ]
        shown.append(f"prompts      {self.num_prompts} to sample, {self.num_bad_rows} bad or repeated rows")
        shown += [f"policy       {line}" for line in policy_lines(c)]
        most = c.generation.most_candidates
        shown.append(
            f"candidates   {'up to ' if c.generation.max_candidates else ''}{self.num_prompts} x {most} = {self.num_prompts * most}, "
            f"at most {self.max_tokens:,} tokens"
        )
        shown.append(
            f"rough time   {duration(self.seconds) if self.seconds is not None else 'unknown'} for generation at the most"
        )
        return [*shown, *(f"note         {note}" for note in self.notes)]


def plan(
    config: ConfigSource, overrides: Iterable[str] = (), *, cpus: float | None = None, gpus: float | None = None
) -> Preview:
    """Validates a configuration and says what it would do, of rounds the first one; writes nothing and starts nothing.

    Args:
        config, overrides: see `run`.
        cpus, gpus: of the cluster it is meant for; by default this machine's logical CPUs and no GPU.

    Raises:
        RcRayError: whatever would stop the run before it starts.
    """
    resolved = load_config(config, overrides)
    stages.check(round_config(resolved, 1, None) if resolved.rounds.number > 1 else resolved)
    logical, reason = local_cpus(resolved.cluster)
    on_gpu = bool(gpus)
    try:
        pools = make_plan(resolved, cpus if cpus is not None else logical, gpus or 0.0)
    except ClusterError as error:
        if gpus is not None:
            raise
        raise ClusterError(
            f"{error}; this was planned without GPUs: give those of the cluster by --gpus, its CPUs by --cpus"
        ) from None
    seen: set[str] = set()
    bad = 0
    for cell in read_cells("prompts", resolved.prompts):
        messages = to_messages(cell, resolved.prompts.column)
        key = "" if isinstance(messages, BadRow) else json.dumps(messages)
        if not key or key in seen:
            bad += 1
        else:
            seen.add(key)
    max_tokens = len(seen) * resolved.generation.most_candidates * resolved.generation.max_tokens
    members = members_of(resolved)
    sizes = [_parameters(member.model) for member in members]
    weights = [member.weight for member in members]
    parameters = None if None in sizes else round(sum(w * (n or 0) for w, n in zip(weights, sizes, strict=True)) / sum(weights))
    notes = []
    if cpus is None:
        notes.append(f"planned for a local cluster with {logical} CPUs ({reason}); --cpus and --gpus plan for another")
    seconds = None
    if parameters:
        flops = (
            GPU_FLOPS * sum(pool.total_gpus for pool in pools.engines.values()) if on_gpu else CPU_FLOPS_PER_CORE * num_cores()
        )
        seconds = 2 * parameters * max_tokens / flops
        notes.append(
            f"time assumes {parameters / 1e6:.0f} M parameters and {flops / 1e9:.0f} GFLOP/s sustained, all answers of full length"
        )
    return Preview(resolved, pools, len(seen), bad, max_tokens, seconds, notes)


def _parameters(model: str) -> int | None:
    """Parameters of a local or embedded model by the size of its weights; None when they are not at hand."""
    if model.startswith("embedded:") and not embedded.is_built(model):
        return 135_000_000 if model.endswith("135m") else None
    if model.startswith("embedded:") or Path(model).expanduser().is_dir():
        return _count(Path(local_model(model)))
    return None


def _count(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for extent in tensor["shape"]:
                    size *= extent
                total += size
    if not total:
        raise DataError(f"{str(folder)!r} has no readable safetensors weights")
    return total
