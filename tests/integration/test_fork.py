"""A run that begins with what is valid of another one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import rc_ray
from rc_ray.config import SelectionConfig, load_config
from rc_ray.core.selection import fit_selection, select_pairs
from rc_ray.errors import ResumeError
from rc_ray.ledger import rundir
from rc_ray.pipeline.stages import check, prepare
from tests.conftest import FinishedRun, sampling_counts


def forked(finished_run: FinishedRun, folder: Path, **sections: Any) -> tuple[Path, list[str]]:
    config = copy.deepcopy(finished_run.config) | {"training": {"enabled": False}, "evaluation": {}, "output": str(folder)}
    for name, options in sections.items():
        config[name] = {**config[name], **options}
    lines: list[str] = []
    result = rc_ray.run(config, fork_from=str(finished_run.folder), emit=lines.append)
    assert result.metrics["identity"]["prompts"] == 38
    assert sampling_counts(result) == sampling_counts(finished_run.result)
    return folder, lines


def candidates(folder: Path, *columns: str) -> list[dict[str, Any]]:
    return list(
        pq.read_table(folder / "candidates").sort_by("prompt_id").select(["prompt_id", "candidates", *columns]).to_pylist()
    )


def test_another_selection_samples_and_scores_nothing(finished_run: FinishedRun, tmp_path: Path) -> None:
    folder, lines = forked(finished_run, tmp_path / "weak", selection={"consistency": "weak", "gap": "sum"})
    assert any("rewards kept: all" in line for line in lines)
    assert "rc_ray    to do: select" in lines
    columns = ["reward.helpful", "reward.harmless", "reward.length"]
    assert candidates(folder, *columns) == candidates(finished_run.folder, *columns)
    config = SelectionConfig(consistency="weak", gap="sum", allow_truncated_winner=True)
    expected = select_pairs(pq.read_table(folder / "candidates"), config).pairs.sort_by("prompt_id")
    found = pq.read_table(folder / "pairs").sort_by("prompt_id")
    for column in ("prompt_id", "chosen_index", "rejected_index", "gap"):
        assert found.column(column).to_pylist() == expected.column(column).to_pylist()
    assert rundir.open_existing(str(folder)).manifest()["forked_from"]["run"] == str(finished_run.folder)


def test_transforms_are_fitted_to_all_chunks_and_kept(finished_run: FinishedRun, tmp_path: Path) -> None:
    options = {
        "transforms": {"helpful": {"kind": "zscore", "clip": [-2.0, 2.0]}, "length": {"kind": "quantile"}},
        "ensembles": {"good": {"members": ["helpful", "harmless"], "combine": "mean"}},
    }
    folder, lines = forked(finished_run, tmp_path / "values", selection=options)
    assert "rc_ray    to do: select" in lines
    config = load_config(folder / "config.yaml").selection
    table = pq.read_table(folder / "candidates")
    expected = select_pairs(table, config).pairs.sort_by("prompt_id")
    found = pq.read_table(folder / "pairs").sort_by("prompt_id")
    assert found.num_rows > 5
    for column in ("prompt_id", "chosen_index", "rejected_index", "gap", "rewards_chosen"):
        assert found.column(column).to_pylist() == expected.column(column).to_pylist()
    kept = rundir.open_existing(str(folder)).manifest()["selection"]
    assert fit_selection([table], config).as_dict() == {key: value for key, value in kept.items() if key != "chunks"}
    with pytest.raises(ResumeError, match=r"selection\.transforms\.length\.kind: 'quantile' -> 'lsc'"):
        rc_ray.run(str(folder / "config.yaml"), overrides=["selection.transforms.length.kind=lsc"])


def test_another_reward_is_scored_alone(finished_run: FinishedRun, tmp_path: Path) -> None:
    rule = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 1}}
    folder, lines = forked(finished_run, tmp_path / "short", rewards={"length": rule})
    assert any("rewards kept: helpful, harmless" in line for line in lines)
    assert "rc_ray    to do: score, select" in lines
    kept = ["reward.helpful", "reward.harmless"]
    assert candidates(folder, *kept) == candidates(finished_run.folder, *kept)
    for group in candidates(folder, "reward.length"):
        assert group["reward.length"] == [-abs(len(c["text"].split()) - 1) for c in group["candidates"]]


def test_rewards_stay_where_a_later_session_has_other_phases_and_another_order(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    folder, _ = forked(finished_run, tmp_path / "run")
    columns = ["reward.helpful", "reward.harmless", "reward.length"]
    before, pairs = candidates(folder, *columns), pq.read_table(folder / "pairs").sort_by("prompt_id")
    for stage in ("score", "select"):
        (folder / "ledger" / stage / "chunk-000001.json").unlink()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["rewards"] = {name: {**reward, "pool": {"num_cpus": 5}} for name, reward in reversed(config["rewards"].items())}
    lines: list[str] = []
    rc_ray.run(config, emit=lines.append)
    assert any("one reward after the other" in line for line in lines), "they were scored together"
    for one, other in zip(candidates(folder, *columns), before, strict=True):
        assert one["candidates"] == other["candidates"]
        for column in columns:
            assert one[column] == pytest.approx(other[column], abs=1e-5)
    again = pq.read_table(folder / "pairs").sort_by("prompt_id")
    assert again.column("prompt_id") == pairs.column("prompt_id")
    (names,) = {tuple(pq.read_schema(file).field("rewards_chosen").type.names) for file in (folder / "pairs").glob("*.parquet")}
    assert names == ("helpful", "harmless", "length")


def test_a_run_that_has_begun_with_other_chunks_takes_none_over(finished_run: FinishedRun, tmp_path: Path) -> None:
    config = copy.deepcopy(finished_run.config) | {"training": {"enabled": False}, "evaluation": {}}
    config |= {"output": str(tmp_path / "run"), "cluster": {"chunk_size": 5}}
    prepare(load_config(config), check(load_config(config)), lambda _: None)
    with pytest.raises(ResumeError, match="split into other chunks"):
        rc_ray.run(config, fork_from=str(finished_run.folder), emit=lambda _: None)


def test_held_out_prompts_that_are_all_trained_on_are_named_before_anything_runs(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    config = copy.deepcopy(finished_run.config) | {"output": str(tmp_path / "run")}
    config["evaluation"] = {"prompts": config["prompts"]}
    with pytest.raises(
        rc_ray.DataError, match=r"evaluation\.prompts\.path = .*none of its 38 rows is left.*in_training_prompts"
    ):
        rc_ray.run(config, emit=lambda _: None)


def test_other_candidates_are_not_taken_over(finished_run: FinishedRun, tmp_path: Path) -> None:
    config = finished_run.config | {"output": str(tmp_path / "run"), "seed": 7}
    with pytest.raises(rc_ray.ConfigError, match=r"--fork-from .* candidates are not those[^$]*seed: 0 -> 7"):
        rc_ray.run(config, fork_from=str(finished_run.folder), emit=lambda _: None)
    assert not (tmp_path / "run").exists()
