"""One configuration, one undisturbed run of it, and drivers that end with their test."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fault.drivers import CHUNK_SIZE, NUM_PROMPTS, Driver

StartDriver = Callable[..., Driver]


def write_prompts(folder: Path, prompts: list[str]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


@pytest.fixture(scope="session")
def undisturbed_config(tiny_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sampling, a reward model and a slow rule, so that there is a middle of sampling and one of scoring; no training."""
    folder = tmp_path_factory.mktemp("fault")
    config = copy.deepcopy(tiny_config) | {"training": {"enabled": False}, "evaluation": {}, "output": str(folder / "whole")}
    config["generation"]["max_tokens"] = 96
    config["rewards"] = {
        "helpful": config["rewards"]["helpful"],
        "length": {"kind": "rule", "function": "tests.fault.rules:slow_length", "args": {"pause_s": 0.3}},
    }
    config["cluster"] = {"address": "local", "chunk_size": CHUNK_SIZE, "progress_interval_s": 0.5}
    return config | {"prompts": {"path": str(write_prompts(folder, [f"hello {i}" for i in range(NUM_PROMPTS)]))}}


@pytest.fixture(scope="session")
def whole(undisturbed_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an undisturbed run, made once."""
    driver = Driver(undisturbed_config, tmp_path_factory.mktemp("drivers"))
    try:
        driver.finished()
    finally:
        driver.kill()
    return driver.folder


@pytest.fixture
def config(undisturbed_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same with a run directory of the test's own, which it may change."""
    return copy.deepcopy(undisturbed_config) | {"output": str(tmp_path / "run")}


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[StartDriver]:
    """Starts drivers; the arguments are those of `Driver` but for the scratch folder."""
    started: list[Driver] = []

    def start(config: dict[str, Any], **options: Any) -> Driver:
        started.append(Driver(config, tmp_path, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()
