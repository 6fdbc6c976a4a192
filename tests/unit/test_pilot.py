"""The numbers of a pilot against a direct computation on recorded groups; real pilots are in tests/integration."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rc_ray.config import load_config
from rc_ray.core import schemas
from rc_ray.core.statistics import Interval
from rc_ray.errors import DataError
from rc_ray.ledger import rundir
from rc_ray.ledger.rundir import RunDir
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline import pilot
from rc_ray.pipeline.pilot import Prediction, pilot_lines
from tests.unit.test_config import GOOD


def directory(folder: Path, rewards: np.ndarray, gpus: float = 2.0) -> RunDir:
    """A finished pilot: groups with these rewards (groups, answers, 2), answer i of i + 1 tokens, at 10 tokens a second."""
    run = RunDir(Folder(str(folder)))
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": f"{g:032x}",
            "prompt": [{"role": "user", "content": "x"}],
            "candidates": [
                {"text": f"{g} {i}", "token_ids": [0] * (i + 1), "finish_reason": "stop", "seed": i, "logprob": -1.0}
                for i in range(group.shape[0])
            ],
            "reward.helpful": group[:, 0].tolist(),
            "reward.harmless": group[:, 1].tolist(),
        }
        for g, group in enumerate(rewards)
    ]
    schema = pa.schema([*schemas.GROUP, *schemas.reward_fields(["helpful", "harmless"])])
    run.candidates.write_table("chunk-000000.parquet", pa.Table.from_pylist(rows, schema=schema))
    run.root.write_json("manifest.json", {"timing": {"tokens": 1000, "seconds": 100.0, "gpus": gpus}})
    return run


REWARDS = np.random.default_rng(0).normal(size=(40, 6, 2)).astype(np.float32) * [1, -1]


def has_pair(group: np.ndarray) -> bool:
    return any((a > b).all() for a in group for b in group)


def predict(run: RunDir, *overrides: str, price: float | None = 3.0) -> Prediction:
    config = load_config(GOOD, ["generation.num_candidates=6", *overrides])
    return pilot._predict(config, run, num_prompts=1000, price=price)


def test_every_number_of_answers_is_predicted_from_the_first_ones(tmp_path: Path) -> None:
    prediction = predict(directory(tmp_path, REWARDS))
    assert list(prediction.estimates) == ["N=2", "N=4", "N=6", "adaptive 2..6"]
    assert prediction.planned == "N=6"
    for n in (2, 4, 6):
        estimate, tokens = prediction.estimates[f"N={n}"], n * (n + 1) / 2
        share = np.mean([has_pair(group[:n]) for group in REWARDS])
        assert estimate.pairs_per_prompt.mean == pytest.approx(share)
        assert estimate.pairs_per_prompt.low <= share <= estimate.pairs_per_prompt.high
        assert estimate.tokens_per_prompt == Interval(tokens, tokens, tokens)
        assert estimate.tokens_per_pair.mean == pytest.approx(tokens / share)
        assert estimate.hours.mean == pytest.approx(tokens * 1000 / 10 / 3600)
        assert estimate.cost_per_pair is not None
        # 2 GPUs at 3 per hour, for as long as the tokens of a pair take.
        assert estimate.cost_per_pair.mean == pytest.approx(3 * 2 * (tokens / share) / 10 / 3600)
        assert prediction.yields["helpful + harmless"][n] == pytest.approx(share)


def test_the_interval_is_about_that_of_a_proportion(tmp_path: Path) -> None:
    interval = predict(directory(tmp_path, REWARDS)).estimates["N=2"].pairs_per_prompt
    error = 1.96 * math.sqrt(interval.mean * (1 - interval.mean) / len(REWARDS))
    assert interval.high - interval.mean == pytest.approx(error, abs=0.04)
    assert interval.mean - interval.low == pytest.approx(error, abs=0.04)


def test_adaptive_is_followed_round_by_round(tmp_path: Path) -> None:
    prediction = predict(directory(tmp_path, REWARDS), "generation.num_candidates=2", "generation.max_candidates=6")
    assert prediction.planned == "adaptive 2..6"
    used = [next((n for n in (2, 4, 6) if has_pair(group[:n])), 6) for group in REWARDS]
    estimate = prediction.estimates["adaptive 2..6"]
    assert estimate.tokens_per_prompt.mean == pytest.approx(np.mean([n * (n + 1) / 2 for n in used]))
    assert estimate.pairs_per_prompt == prediction.estimates["N=6"].pairs_per_prompt


def test_adaptive_goes_on_where_the_gap_is_too_small(tmp_path: Path) -> None:
    run = directory(tmp_path, REWARDS)
    options = ["generation.num_candidates=2", "generation.max_candidates=6", "selection.gap=sum"]
    plain = predict(run, *options).estimates["adaptive 2..6"]
    wanting, hopeless = (
        predict(run, *options, f"generation.target_gap={gap}").estimates["adaptive 2..6"] for gap in (1.0, 1e9)
    )
    assert plain.tokens_per_prompt.mean < wanting.tokens_per_prompt.mean < hopeless.tokens_per_prompt.mean == 21
    assert plain.pairs_per_prompt == wanting.pairs_per_prompt == hopeless.pairs_per_prompt


def test_a_pilot_without_its_times_is_an_error(tmp_path: Path) -> None:
    run = directory(tmp_path, REWARDS)
    run.root.write_json("manifest.json", {})
    with pytest.raises(DataError, match="was killed before it could say how long it took; remove that folder"):
        predict(run)


def test_what_came_out_is_compared_with_the_prediction_for_what_was_run(tmp_path: Path) -> None:
    run = rundir.create(load_config(GOOD, [f"output={tmp_path / 'run'}", "generation.num_candidates=4"]), {})
    Folder.at(tmp_path / "run-pilot").write_json("pilot.json", asdict(predict(directory(tmp_path / "pilot", REWARDS))))
    run.ledger.finish("prompts", {"prompts": 100})
    # A session that sampled 600 of the 1000 tokens was killed; the other one took an hour for its 400, on two GPUs.
    run.update_manifest(timing={"tokens": 400, "seconds": 3600.0, "gpus": 2.0})
    found = pilot.side_by_side(run, {"identity": {"not_sampled": 50, "paired": 10}, "sampling": {"tokens": 1000}})
    assert found is not None
    assert found["planned"] == "N=4"
    assert found["predicted"] == asdict(predict(directory(tmp_path / "again", REWARDS)))["estimates"]["N=4"]
    assert found["actual"] == {
        "pairs_per_prompt": 0.2, "tokens_per_prompt": 20.0, "tokens_per_pair": 100.0, "hours": 2.5, "cost_per_pair": 3.0 * 2 * 2.5 / 10,
    }  # fmt: skip


def test_without_a_pair_the_cost_is_infinite_and_without_a_price_it_is_left_out(tmp_path: Path) -> None:
    contradicting = REWARDS.copy()
    contradicting[:, :, 1] = -contradicting[:, :, 0]
    run = directory(tmp_path, contradicting, gpus=0.0)
    assert predict(run).estimates["N=6"].tokens_per_pair.mean == math.inf
    assert "inf" in "\n".join(predict(run).lines())
    unpriced = predict(run, price=None)
    assert unpriced.estimates["N=6"].cost_per_pair is None
    assert "cost" not in "\n".join(unpriced.lines())


def test_a_pilot_without_answers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompt with two answers"):
        predict(directory(tmp_path, REWARDS[:, :1]))


def test_prompts_are_drawn_by_their_ids_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "question {i % 30}"}}\n' for i in range(40)) + '{"prompt": ""}\n')
    config = load_config(GOOD, [f"prompts.path={path}"])
    drawn, total = pilot._draw(config, 5)
    assert (len(drawn), total) == (5, 30)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert pilot._draw(config, 5) == (drawn, 30)
    assert len(pilot._draw(config, 99)[0]) == 30


def test_predicted_and_actual_stand_side_by_side() -> None:
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    lines = pilot_lines(
        {
            "planned": "N=6",
            "predicted": {"pairs_per_prompt": interval, "hours": interval, "cost_per_pair": None},
            "actual": {"pairs_per_prompt": 0.55, "hours": None, "cost_per_pair": None},
        }
    )
    assert lines[0] == "predicted by the pilot for N=6, and actual"
    assert len(lines) == 2
    assert "0.5 [0.4, 0.6]" in lines[1]
    assert lines[1].endswith("0.55")
