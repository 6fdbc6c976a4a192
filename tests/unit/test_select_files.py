"""`rc-ray select` from files to files: formats, resume, filters of existing pairs, bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.cli import main
from rc_ray.config import SelectionConfig
from rc_ray.core.selection import select_pairs
from rc_ray.errors import ResumeError
from rc_ray.pipeline import scored_files
from rc_ray.pipeline.scored_files import ScoredSource
from rc_ray.pipeline.select_files import select_files


def scored_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": f"question {g}",
            "candidates": [{"text": f"answer {g} {i}", "finish_reason": "length" if i == 3 else "stop"} for i in range(4)],
            "reward.helpful": rng.normal(size=4).astype(np.float32).astype(float).round(3).tolist(),
            "reward.brief": [float(i % 3) for i in range(4)],
        }
        for g in range(count)
    ]


def preferences() -> list[dict[str, Any]]:
    rewards = [((2, 1), (1, 0)), ((2, 1), (1, 5)), ((2, 1), (2, 0)), ((2, None), (1, 0))]
    return [
        {
            "prompt": f"question {i}",
            "chosen": f"good {i}",
            "rejected": f"bad {i}",
            "rewards_chosen": dict(zip(("helpful", "harmless"), chosen, strict=True)),
            "rewards_rejected": dict(zip(("helpful", "harmless"), rejected, strict=True)),
            "source": f"file {i}",
        }
        for i, (chosen, rejected) in enumerate(rewards)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return tuple(pq.read_table(folder / name).to_pylist() for name in ("pairs", "drops"))  # type: ignore[return-value]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, so that small files have several."""
    monkeypatch.setattr(scored_files, "TARGET_BYTES", 1)


@pytest.mark.usefixtures("small_chunks")
def test_parquet_jsonl_and_folders_give_what_select_pairs_gives(tmp_path: Path) -> None:
    rows = scored_rows(100)
    table = pa.Table.from_pylist(rows)
    expected = select_pairs(table, SelectionConfig())
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=30)
    write_jsonl(tmp_path / "one.jsonl", rows)
    (tmp_path / "many").mkdir()
    for i in range(4):
        pq.write_table(table.slice(25 * i, 25), tmp_path / "many" / f"{i}.parquet")
    with gzip.open(tmp_path / "one.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for name in ("one.parquet", "one.jsonl", "many", "one.jsonl.gz"):
        output = tmp_path / f"{name}.out"
        assert main(["select", "--input", str(tmp_path / name), "--output", str(output)]) == 0
        pairs, drops = read(output)
        assert pairs == expected.pairs.to_pylist()
        assert drops == expected.drops.to_pylist()
        assert len(list((output / "pairs").iterdir())) == 7
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["prompts"] == 100 == metrics["paired"] + sum(metrics["drops"].values())


@pytest.mark.parametrize("size", [1, 7, 16, 100, 1000])
@pytest.mark.parametrize("start", [0, 1, 29, 30, 99])
def test_a_source_gives_the_same_rows_from_any_start(tmp_path: Path, size: int, start: int) -> None:
    rows = scored_rows(100)
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:60]), tmp_path / "in" / "a.parquet", row_group_size=30)
    write_jsonl(tmp_path / "in" / "b.jsonl", rows[60:])
    source = ScoredSource.open(str(tmp_path / "in"))
    assert source.num_rows == 100
    tables = list(source.tables(size, start))
    assert [t.num_rows for t in tables[:-1]] == [size] * (len(tables) - 1)
    assert [row["prompt"] for t in tables for row in t.to_pylist()] == [row["prompt"] for row in rows[start:]]


@pytest.mark.usefixtures("small_chunks")
def test_a_finished_selection_is_not_repeated_and_a_missing_chunk_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", scored_rows(100)), tmp_path / "out"
    lines: list[str] = []
    first = select_files(str(source), str(output), SelectionConfig(), lines.append)
    files = {path: path.stat().st_mtime_ns for path in (output / "pairs").iterdir()}
    (output / "ledger" / "select" / "chunk-000002.json").unlink()
    (output / "pairs" / ".chunk-000005.parquet.0badf00d.tmp").write_text("left by a killed write")
    lines.clear()
    assert select_files(str(source), str(output), SelectionConfig(), lines.append) == first
    changed = [path.name for path in (output / "pairs").iterdir() if files.get(path) != path.stat().st_mtime_ns]
    assert changed == ["chunk-000002.parquet"]
    assert any("32 of 100 rows are committed already" in line for line in lines)


def test_other_options_or_another_input_are_refused_with_the_difference(tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", scored_rows(20)), str(tmp_path / "out")
    select_files(str(source), output, SelectionConfig(), lambda _: None)
    with pytest.raises(ResumeError, match=r"selection\.strategy: 'rcs' -> 'pareto'"):
        select_files(str(source), output, SelectionConfig(strategy="pareto"), lambda _: None)
    write_jsonl(source, scored_rows(21))
    with pytest.raises(ResumeError, match="input"):
        select_files(str(source), output, SelectionConfig(), lambda _: None)


def test_existing_pairs_are_filtered_and_keep_their_columns(tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", preferences()), tmp_path / "out"
    options = ["--set", "selection.strategy=rc_filter"]
    assert main(["select", "--input", str(source), "--output", str(output), *options, "--report"]) == 0
    pairs, drops = read(output)
    assert [(p["source"], p["agreeing"], p["chosen"][0]["content"]) for p in pairs] == [
        ("file 0", ["helpful", "harmless"], "good 0")
    ]
    assert [(d["reason"], d["detail"]) for d in drops] == [
        ("no_consistent_pair", "agree: helpful; disagree: harmless"),
        ("no_consistent_pair", "agree: harmless; tie: helpful"),
        ("reward_missing", "harmless: a reward is null or not finite"),
    ]
    report = json.loads((output / "report.json").read_text())
    assert report["strategies"]["as given"]["pairs"] == 3
    assert report["strategies"]["as given"]["conflict"] == pytest.approx(1 / 3)
    assert report["strategies"]["rc_filter"] == {"pairs": 1, "yield": pytest.approx(1 / 3), "conflict": 0.0, "length_only": 1.0}


def test_the_selection_of_a_configuration_file_is_used(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", scored_rows(20))
    (tmp_path / "c.yaml").write_text("selection: {strategy: best_worst, gap: 'primary:brief'}\n")
    command = ["select", str(tmp_path / "c.yaml"), "--input", str(source), "--output", str(tmp_path / "out")]
    assert main([*command, "--set", "selection.max_length_ratio=3"]) == 0
    assert {p["strategy"] for p in read(tmp_path / "out")[0]} == {"best_worst"}


@pytest.mark.parametrize(
    ("content", "options", "code", "words"),
    [
        ('{"prompt": "a"', [], 3, ["in.jsonl line 1", "not JSON"]),
        ("[1]\n", [], 3, ["in.jsonl line 1", "expected an object"]),
        ("", [], 3, ["there is no row"]),
        ('{"prompt": "a", "candidates": []}\n', [], 3, ["no reward.* column", "rc-ray score"]),
        ('{"prompt": "a", "candidates": [{"text": "x"}], "reward.a": ["high"]}\n', [], 3, ["'reward.a'", "one number per candidate"]),
        ('{"prompt": "a", "chosen": "x", "rejected": "y"}\n', [], 3, ["rewards_chosen", "a field per objective"]),
        (None, ["selection.strategy=rc_filter"], 2, ["rc_filter is for existing pairs"]),
        (None, ["selection.strategy=best"], 2, ["selection.strategy = 'best'", "rcs"]),
        (None, ["selection.margins={nice: 1}"], 2, ["selection.margins", "'nice'", "helpful, brief"]),
        (None, ["selection.tau=2"], 2, ["tau has no effect with strategy rcs", "rs_dpo"]),
        (None, ["generation.num_candidates=2"], 2, ["generation.num_candidates=2", "selection.KEY=VALUE"]),
        (None, ["selection.strategy=map", "selection.targets={helpful: 99}"], 3, ["targets.helpful = 99", "no sample is above"]),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, options: list[str], code: int, words: list[str]
) -> None:
    source = tmp_path / "in.jsonl"
    if content is None:
        write_jsonl(source, scored_rows(5))
    else:
        source.write_text(content)
    settings = [part for option in options for part in ("--set", option)]
    assert main(["select", "--input", str(source), "--output", str(tmp_path / "out"), *settings]) == code
    printed = capsys.readouterr().err
    for word in words:
        assert word in printed
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", scored_rows(5))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(["select", "--input", str(source), "--output", str(tmp_path / "out")]) == 3
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
