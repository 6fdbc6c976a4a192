"""A pilot on real engines: its answers are those of the run, and prediction and outcome stand side by side afterwards."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import rc_ray
from rc_ray.cli import main
from tests.conftest import FinishedRun


def answers(folder: Path) -> dict[str, list[str]]:
    rows = pq.read_table(folder / "candidates", columns=["prompt_id", "candidates"]).to_pylist()
    return {row["prompt_id"]: [c["text"] for c in row["candidates"]] for row in rows}


def test_plan_with_a_pilot_predicts_and_the_run_is_compared_with_it(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy.deepcopy(finished_run.config) | {
        "output": str(tmp_path / "run"),
        "training": {"enabled": False},
        "evaluation": {},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["plan", str(tmp_path / "my.yaml"), "--pilot", "12", "--price-per-gpu-hour", "2"]) == 0
    printed = capsys.readouterr().out
    for words in ("12 of 31 prompts", "cost per pair", "N=6 *", "adaptive 2..6", "helpful + harmless + length"):
        assert words in printed
    (directory,) = (tmp_path / "run-pilot").glob("run-*")
    sampled, whole = answers(directory), answers(finished_run.folder)
    assert len(sampled) == 12
    assert all(whole[identity] == texts for identity, texts in sampled.items())
    lines: list[str] = []
    result = rc_ray.run(config, emit=lines.append)
    assert result is not None
    compared = result.metrics["pilot"]
    identity = result.metrics["identity"]
    assert compared["planned"] == "N=6"
    assert compared["actual"]["pairs_per_prompt"] == identity["paired"] / 31
    assert compared["actual"]["tokens_per_pair"] == result.metrics["sampling"]["tokens"] / identity["paired"]
    assert compared["actual"]["hours"] > 0
    assert compared["predicted"] == json.loads((tmp_path / "run-pilot" / "pilot.json").read_text())["estimates"]["N=6"]
    assert any("predicted by the pilot for N=6" in line for line in lines)
    assert main(["plan", str(tmp_path / "my.yaml"), "--price-per-gpu-hour", "2"]) == 2
    assert "no effect without --pilot" in capsys.readouterr().err
