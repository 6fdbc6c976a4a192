"""Prompt sources: the same prompts from every format, every bad row as one drop, every bad source named."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.config import PromptsConfig
from rc_ray.core import schemas
from rc_ray.core.ids import prompt_id
from rc_ray.errors import DataError
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline import prompts as prompts_of
from rc_ray.pipeline.prompts import BadRow, check_source, read_cells, to_messages, write_chunks

TEXTS = ["plain question?", 'with "quotes", commas', "two\nlines\r\n\nand more", "emoji 😀, مرحبا", "  padded  "]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "How are you?"},
]


def write_jsonl(path: Path, rows: list[Any]) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "prompt"], *([i, text] for i, text in enumerate(texts))])


def as_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"id": range(len(TEXTS)), "prompt": TEXTS}), folder / "p.parquet", row_group_size=2)
    return folder / "p.parquet"


def as_jsonl(folder: Path) -> Path:
    write_jsonl(folder / "p.jsonl", [{"id": i, "prompt": text} for i, text in enumerate(TEXTS)])
    return folder / "p.jsonl"


def as_gzipped_jsonl(folder: Path) -> Path:
    write_jsonl(folder / "p.jsonl.gz", [{"prompt": text} for text in TEXTS])
    return folder / "p.jsonl.gz"


def as_csv(folder: Path) -> Path:
    write_csv(folder / "p.csv", TEXTS)
    return folder / "p.csv"


def as_folder(folder: Path) -> Path:
    data = folder / "data"
    (data / "nested").mkdir(parents=True)
    write_csv(data / "a.csv", TEXTS[:2])
    pq.write_table(pa.table({"prompt": TEXTS[2:4]}), data / "b.parquet")
    write_jsonl(data / "nested" / "c.jsonl", [{"prompt": TEXTS[4]}])
    (data / "README.md").write_text("no prompts here")
    return data


def as_glob(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        write_jsonl(folder / f"part-{number}.jsonl", [{"prompt": text}])
    write_jsonl(folder / "other.jsonl", [{"prompt": "not matched"}])
    return folder / "part-*.jsonl"


def cells_of(path: Path | str, **options: Any) -> list[Any]:
    return list(read_cells("prompts", PromptsConfig(path=str(path), **options)))


def chunked(path: Path | str, folder: Path, chunk_size: int = 8, excluded: Any = (), **options: Any) -> Any:
    """(facts, prompts, drops) of writing a source into chunks."""
    config = PromptsConfig(path=str(path), **options)
    chunks, drops = Folder.at(folder / "chunks"), Folder.at(folder / "drops")
    facts = write_chunks(read_cells("prompts", config), config, chunks, drops, chunk_size, frozenset(excluded))
    return facts, chunks.read_all(schemas.PROMPT).to_pylist(), drops.read_all(schemas.DROP).to_pylist()


@pytest.mark.parametrize("write", [as_parquet, as_jsonl, as_gzipped_jsonl, as_csv, as_folder, as_glob])
def test_every_format_gives_the_same_cells_and_ids(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    assert check_source("prompts", PromptsConfig(path=str(path)))
    assert cells_of(path) == TEXTS
    facts, prompts, drops = chunked(path, tmp_path / "out")
    assert [row["prompt_id"] for row in prompts] == [prompt_id([{"role": "user", "content": t}]) for t in TEXTS]
    assert [row["prompt"] for row in prompts] == [[{"role": "user", "content": t}] for t in TEXTS]
    assert (facts["rows"], drops) == (5, [])


def test_files_of_a_folder_and_a_glob_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 6, 4):
        write_jsonl(tmp_path / f"part-{number:02d}.jsonl", [{"prompt": f"{number}"}])
    for path in (tmp_path, tmp_path / "*.jsonl"):
        assert cells_of(path) == [str(number) for number in range(12)]


def test_a_set_format_wins_over_the_ending(tmp_path: Path) -> None:
    as_jsonl(tmp_path).rename(tmp_path / "p.txt")
    assert cells_of(tmp_path / "p.txt", format="jsonl") == TEXTS


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_message_lists_are_taken_as_they_are(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"m.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"chat": pa.array([CONVERSATION], schemas.MESSAGES)}), path)
    else:
        write_jsonl(path, [{"chat": [{**m, "name": "extra"} for m in CONVERSATION]}])
    facts, prompts, _ = chunked(path, tmp_path / "out", column="chat")
    assert facts["drops"] == {}
    assert prompts == [{"prompt_id": prompt_id(CONVERSATION), "prompt": CONVERSATION}]


@pytest.mark.parametrize("at_once", [3, 7, 10_000])
def test_every_kind_of_bad_row_is_one_drop_with_its_reason(
    mixed_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(prompts_of, "DROPS_AT_ONCE", at_once)
    facts, prompts, drops = chunked(mixed_prompts, tmp_path)
    assert facts == {
        "rows": 38,
        "prompts": 31,
        "chunks": 4,
        "chunk_size": 8,
        "drops": {"empty_prompt": 2, "duplicate_prompt": 1, "invalid_prompt": 4},
    }
    found = [(drop["reason"], drop["detail"]) for drop in drops]
    assert found == [
        ("empty_prompt", "row 32: no text"),
        ("empty_prompt", "row 33: no text"),
        ("duplicate_prompt", "row 34: same as row 4"),
        ("invalid_prompt", "row 35: int, not a string or a list of messages: 42"),
        ("invalid_prompt", "row 36: null, not a string or a list of messages"),
        ("invalid_prompt", "row 37: the last message is from 'assistant', not from `user`"),
        ("invalid_prompt", "row 38: the row has no column 'prompt'"),
    ]
    assert {drop["stage"] for drop in drops} == {"prompts"}
    assert drops[2]["prompt_id"] == prompts[3]["prompt_id"]
    assert len({drop["prompt_id"] for drop in drops}) == len(drops)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ('{"prompt": "cut', "invalid_prompt", "not valid JSON"),
        ('["prompt"]', "invalid_prompt", "no JSON object"),
        ('{"prompt": "half an emoji \\ud83d"}', "invalid_prompt", "not valid UTF-8"),
        ('{"prompt": []}', "empty_prompt", "no text"),
        ('{"prompt": [{"role": "user"}]}', "invalid_prompt", "needs `role` and `content`"),
        ('{"prompt": [{"role": "user", "content": 3}]}', "invalid_prompt", "needs `role` and `content`"),
        ('{"prompt": {"role": "user", "content": "x"}}', "invalid_prompt", "dict, not a string"),
        ('{"prompt": [{"role": "user", "content": " "}]}', "empty_prompt", "no text"),
    ],
)
def test_a_bad_line_is_dropped_and_the_rest_is_kept(line: str, reason: str, detail: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "before"}, line, {"prompt": "after"}])
    facts, prompts, drops = chunked(tmp_path / "p.jsonl", tmp_path / "out")
    assert [row["prompt"][0]["content"] for row in prompts] == ["before", "after"]
    assert facts["drops"] == {reason: 1}
    assert drops[0]["detail"].startswith("row 2: ")
    assert detail in drops[0]["detail"]


def test_bytes_that_are_no_utf8_are_a_bad_row_in_jsonl_and_csv(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n{"prompt": "ok"}\n')
    (tmp_path / "p.csv").write_bytes(b"prompt\ncaf\xe9\nok\n")
    for name in ("p.jsonl", "p.csv"):
        facts, prompts, _ = chunked(tmp_path / name, tmp_path / f"out-{name}")
        assert facts["drops"] == {"invalid_prompt": 1}
        assert prompts[0]["prompt"][0]["content"] == "ok"


def test_a_short_csv_row_has_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("id,prompt\n1\n2,fine\n")
    facts, prompts, _ = chunked(tmp_path / "p.csv", tmp_path / "out")
    assert (facts["drops"], len(prompts)) == ({"invalid_prompt": 1}, 1)


def test_blank_lines_of_jsonl_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('\n{"prompt": "a"}\n\n  \n{"prompt": "b"}')
    assert cells_of(tmp_path / "p.jsonl") == ["a", "b"]


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (3, 3), (99, 5)])
def test_limit_takes_the_first_rows_of_all_files_together(limit: int, expected: int, tmp_path: Path) -> None:
    assert cells_of(as_folder(tmp_path), limit=limit) == TEXTS[:expected]


def test_chunks_are_full_in_order_and_hold_every_prompt_once(tmp_path: Path) -> None:
    texts = [f"question {i}" for i in range(10)]
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": t} for t in [*texts[:4], "", texts[0], *texts[4:]]])
    facts, prompts, drops = chunked(tmp_path / "p.jsonl", tmp_path, chunk_size=4)
    chunks = Folder.at(tmp_path / "chunks")
    names = [f"chunk-{i:06d}.parquet" for i in range(3)]
    assert chunks.names() == names
    assert [chunks.read_table(name).num_rows for name in names] == [4, 4, 2]
    assert chunks.read_table(names[0]).schema.equals(schemas.PROMPT)
    assert [row["prompt"][0]["content"] for row in prompts] == texts
    assert facts == {
        "rows": 12,
        "prompts": 10,
        "chunks": 3,
        "chunk_size": 4,
        "drops": {"empty_prompt": 1, "duplicate_prompt": 1},
    }
    assert facts["rows"] == len(prompts) + len(drops)


def test_excluded_prompts_are_dropped_by_name(tmp_path: Path) -> None:
    excluded = prompt_id([{"role": "user", "content": TEXTS[1]}])
    facts, prompts, drops = chunked(as_jsonl(tmp_path), tmp_path, excluded=[excluded])
    assert facts["drops"] == {"in_training_prompts": 1}
    assert drops[0]["prompt_id"] == excluded
    assert excluded not in {row["prompt_id"] for row in prompts}
    assert len(prompts) == len(TEXTS) - 1


def test_a_source_of_bad_rows_only_writes_no_chunk(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": ""}, {"prompt": None}])
    facts, prompts, drops = chunked(tmp_path / "p.jsonl", tmp_path)
    assert (facts["chunks"], prompts, len(drops)) == (0, [], 2)


def test_system_message_is_added_only_where_there_is_none() -> None:
    system = {"role": "system", "content": "New."}
    assert to_messages("Hi", "prompt", "New.") == [system, {"role": "user", "content": "Hi"}]
    assert to_messages(CONVERSATION, "prompt", "New.") == CONVERSATION
    assert to_messages(CONVERSATION[1:], "prompt", "New.") == [system, *CONVERSATION[1:]]
    assert to_messages("Hi", "prompt") == [{"role": "user", "content": "Hi"}]
    assert isinstance(to_messages("", "prompt", "New."), BadRow)


def test_system_message_is_part_of_the_prompts_id(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path)
    _, plain, _ = chunked(path, tmp_path / "plain")
    _, instructed, _ = chunked(path, tmp_path / "instructed", system="Be brief.")
    assert instructed[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert not {row["prompt_id"] for row in plain} & {row["prompt_id"] for row in instructed}


@pytest.mark.parametrize("write", [as_parquet, as_jsonl, as_csv])
def test_an_absent_column_is_an_error_that_names_the_columns_there_are(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(DataError) as caught:
        check_source("evaluation.prompts", PromptsConfig(path=str(path), column="question"))
    for word in ("evaluation.prompts.column = 'question'", str(path), "it has: id, prompt"):
        assert word in str(caught.value)


def test_one_file_of_a_folder_without_the_column_is_an_error(tmp_path: Path) -> None:
    folder = as_folder(tmp_path)
    write_jsonl(folder / "z.jsonl", [{"question": "x"}])
    with pytest.raises(DataError, match=r"z\.jsonl.*it has: question"):
        check_source("prompts", PromptsConfig(path=str(folder)))


def test_a_column_that_only_some_early_rows_of_jsonl_lack_is_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", ["not json", {"other": 1}, {"prompt": "x"}])
    assert check_source("prompts", PromptsConfig(path=str(tmp_path / "p.jsonl")))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent.jsonl", ["no such file", "absent.jsonl", "hub:org/name"]),
        ("absent-*.csv", ["no such file", "absent-*.csv"]),
        ("empty", ["no such file", "empty"]),
        ("prompts.txt", ["prompts.txt", "ending", "prompts.format"]),
        ("fake.parquet", ["fake.parquet", "not a Parquet file"]),
        ("s4://bucket/p.jsonl", ["s4://bucket/p.jsonl", "use a local path"]),
        ("embedded:nope", ["embedded:nope", "embedded:demo-prompts", "embedded:demo-eval-prompts"]),
    ],
)
def test_a_bad_source_is_an_error_that_names_it(path: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompts.txt").write_text("x")
    (tmp_path / "fake.parquet").write_text("prompt\nthis is no Parquet")
    full = path if ":" in path else str(tmp_path / path)
    with pytest.raises(DataError) as caught:
        check_source("prompts", PromptsConfig(path=full))
    for word in words:
        assert word in str(caught.value)


def test_embedded_prompts_are_read_like_a_file() -> None:
    assert check_source("prompts", PromptsConfig(path="embedded:demo-prompts"))
    assert all(isinstance(cell, str) for cell in cells_of("embedded:demo-prompts", limit=3))


def test_the_content_hash_changes_with_the_content_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = as_jsonl(tmp_path / "a"), as_jsonl(tmp_path / "b")
    original = check_source("prompts", PromptsConfig(path=str(first)))
    assert check_source("prompts", PromptsConfig(path=str(second))) == original
    second.write_text(second.read_text().replace("plain", "Plain"))
    assert check_source("prompts", PromptsConfig(path=str(second))) != original


def test_a_hub_source_is_checked_by_name_and_revision_without_the_network() -> None:
    assert check_source("prompts", PromptsConfig(path="hub:org/set", split="test", revision="abc")) == "hub:org/set@abc/test"
    assert check_source("prompts", PromptsConfig(path="hub:org/set")) == "hub:org/set@main/train"
