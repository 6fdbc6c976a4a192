"""One finished run on tiny models, shared by the tests that look at its parts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import rc_ray
from rc_ray.pipeline.run import RunResult


@dataclass(frozen=True)
class FinishedRun:
    config: dict[str, Any]
    folder: Path
    result: RunResult
    lines: list[str]


@pytest.fixture(scope="session")
def finished_run(tiny_config: dict[str, Any], mixed_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    config = copy.deepcopy(tiny_config)
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    config |= {"output": str(folder), "prompts": {"path": str(mixed_prompts)}}
    lines: list[str] = []
    result = rc_ray.run(config, emit=lines.append)
    return FinishedRun(config, folder, result, lines)
