"""Two on-policy rounds with the first policy as the reference of both, run again, and on to where a round ends them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rc_ray
from rc_ray.core.schemas import templates_of


def test_rounds_go_on_from_the_trained_policy(small_config: dict[str, Any], tmp_path: Path) -> None:
    config = copy.deepcopy(small_config) | {"output": str(tmp_path / "run"), "rounds": {"number": 2, "reference": "initial"}}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"hello number {i}?"}) + "\n" for i in range(16)))
    config["prompts"] = {"path": str(tmp_path / "prompts.jsonl")}
    lines: list[str] = []
    result = rc_ray.run(config, emit=lines.append)
    first, second = tmp_path / "run" / "round-1", tmp_path / "run" / "round-2"
    assert result.run_dir == str(second)
    manifests = [json.loads((run / "manifest.json").read_text()) for run in (first, second)]
    assert set(manifests[1]["models"]) >= {config["model"], str(first / "model")}
    assert [m["result_fields"]["model"] for m in manifests] == [config["model"], str(first / "model")]
    training = [json.loads((run / "metrics.json").read_text())["training"] for run in (first, second)]
    losses = [next(entry["loss"] for entry in t["log_history"] if "loss" in entry) for t in training]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "policy and reference are the same"
    assert abs(losses[1] - math.log(2)) > 1e-3, (
        "the reference is the first policy, which the second round no longer starts from"
    )
    assert training[0]["reference"] == training[1]["reference"]
    texts = [
        {c["text"] for table in (run / "candidates").glob("*.parquet") for g in _rows(table) for c in g["candidates"] or ()}
        for run in (first, second)
    ]
    assert texts[0] != texts[1]
    templates = [templates_of(pq.read_schema(next((run / "pairs").glob("*.parquet")))) for run in (first, second)]
    assert templates[0] == templates[1] != [], "the trained policy reads as the first one does, and pairs say so"

    record = json.loads((tmp_path / "run" / "rounds.json").read_text())
    assert [r["reference"] for r in record["rounds"]] == [config["model"]] * 2
    assert record["rounds"] == result.metrics["rounds"]
    assert all(set(r["rewards"]) == set(config["rewards"]) for r in record["rounds"])
    lines.clear()
    rc_ray.run(config, emit=lines.append)
    assert sum("every stage is finished" in line for line in lines) == 2

    # Where one objective's fall was too much, what follows is not begun, and the policy is that of the round that ended it.
    worst = min(found["difference"] for found in record["rounds"][0]["rewards"].values())
    assert worst < 0
    lines.clear()
    result = rc_ray.run(config | {"rounds": {**config["rounds"], "max_reward_drop": -worst / 2}}, emit=lines.append)
    assert result.run_dir == str(first)
    assert len(result.metrics["rounds"]) == 1
    ended = json.loads((tmp_path / "run" / "rounds.json").read_text())["ended"]
    assert f"more than rounds.max_reward_drop = {-worst / 2:g}" in ended
    assert f"round     no further one: {ended}" in lines


def _rows(file: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(file).to_pylist())
