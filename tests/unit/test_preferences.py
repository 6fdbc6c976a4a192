"""Preference pairs: the forms they come in, what is left out, and the split and interval of reward-model training."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.core.ids import prompt_id
from rc_ray.core.statistics import wilson_interval
from rc_ray.errors import DataError
from rc_ray.training.preferences import Preference, read_preferences
from rc_ray.training.reward_data import Sets, encode_sets, split_by_prompt
from tests.conftest import make_tokenizer

ASKED = [{"role": "user", "content": "Why is the sky blue?"}]


def read(folder: Path, rows: list[Any], name: str = "pairs.jsonl") -> tuple[list[Preference], Counter[str]]:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return read_preferences(str(path))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json", "pairs.parquet"])
def test_plain_strings_in_every_file_format(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": "Why is the sky blue?", "chosen": f"Scattering {i}.", "rejected": "No idea."} for i in range(3)]
    pairs, left_out = read(tmp_path, rows, name)
    assert pairs == [Preference(ASKED, f"Scattering {i}.", "No idea.") for i in range(3)]
    assert not left_out


def test_message_lists_as_a_run_writes_them(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "system", "content": "Be brief."}, *ASKED],
        "chosen": [{"role": "assistant", "content": "Scattering."}],
        "rejected": [{"role": "assistant", "content": "Magic."}],
        "prompt_id": "0",
    }
    for name in ("pairs.jsonl", "pairs.parquet"):
        pairs, _ = read(tmp_path, [row], name)
        assert pairs == [Preference([{"role": "system", "content": "Be brief."}, *ASKED], "Scattering.", "Magic.")]


def test_transcripts_end_with_the_answers(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why is the sky blue?\n\nAssistant:"
    pairs, left_out = read(tmp_path, [{"chosen": f"{start} Light\n\nscatters. ", "rejected": f"{start} It is not."}])
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, *ASKED]
    assert pairs == [Preference(turns, "Light\n\nscatters.", "It is not.")]
    assert not left_out


@pytest.mark.parametrize("scores", [[1, 0], [0.25, 0.75]])
def test_scored_transcripts_put_the_better_one_first(scores: list[float], tmp_path: Path) -> None:
    texts = [f"\n\nHuman: Why is the sky blue?\n\nAssistant: {answer}" for answer in ("first", "second")]
    pairs, _ = read(tmp_path, [{"text": texts, "score": scores}])
    expected = ("first", "second") if scores[0] > scores[1] else ("second", "first")
    assert pairs == [Preference(ASKED, *expected)]


def test_rows_that_are_no_preference_are_counted_by_reason(tmp_path: Path) -> None:
    def transcript(question: str, answer: str) -> str:
        return f"\n\nHuman: {question}\n\nAssistant: {answer}"

    rows = [
        {"text": [transcript("q", "a"), transcript("q", "b")], "score": [1, 1]},
        {"text": [transcript("q", "a"), transcript("r", "b")], "score": [1, 0]},
        {"chosen": transcript("q", "a"), "rejected": transcript("q", "a ")},
        {"chosen": transcript("q", "a"), "rejected": transcript("q", "a\n\nHuman: more")},
        {"chosen": "\n\nHuman: q\n\nHuman: x", "rejected": "\n\nHuman: q\n\nHuman: y"},
        {"chosen": "no transcript", "rejected": "at all"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    pairs, left_out = read(tmp_path, rows)
    assert len(pairs) == 1
    assert left_out == {"equal scores": 1, "prompts differ": 3, "equal answers": 2, "no assistant answer at the end": 1}
    assert len(pairs) + left_out.total() == len(rows)


def test_conversations_in_chosen_and_rejected_are_the_prompt_if_the_row_says_nothing_else(tmp_path: Path) -> None:
    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]

    whole, system = turns("q", "a", "r"), {"role": "system", "content": "s"}
    rows = [
        {"prompt": prompt, "chosen": [*before, *turns("", "x")[1:]], "rejected": [*before, *turns("", "y")[1:]]}
        for prompt, before in (("q", turns("q")), (turns("q"), turns("q")), ("q", whole), ("r", whole), (whole, []), ("q", [system, *turns("q")]))
    ]  # fmt: skip
    pairs, left_out = read(tmp_path, rows)
    assert not left_out
    assert [pair.messages for pair in pairs] == [turns("q"), turns("q"), whole, whole, whole, [system, *turns("q")]]
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("x", "y")}


def test_nothing_is_guessed_about_scores_and_messages(tmp_path: Path) -> None:
    texts = [f"\n\nHuman: q\n\nAssistant: {answer}" for answer in ("first", "second")]
    answer = [{"role": "assistant", "content": "x"}]
    asked = [{"role": "user", "content": "q"}]
    rows = [
        {"text": texts, "score": [3.0, float("nan")]},
        {"text": texts, "score": ["10", "9"]},
        {"prompt": "q", "chosen": [*asked, *answer], "rejected": [{"role": "user", "content": "other"}, *answer]},
        {"prompt": "another", "chosen": [*asked, *answer], "rejected": [*asked, {"role": "assistant", "content": "y"}]},
        {"prompt": "q", "chosen": [*answer, *asked], "rejected": answer},
        {"prompt": "q", "chosen": asked, "rejected": answer},
        {"prompt": "q", "chosen": answer, "rejected": [{"role": "assistant", "content": None}]},
        {"prompt": [], "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": [], "rejected": answer},
    ]
    pairs, left_out = read(tmp_path, rows)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("first", "second")]
    assert left_out == {
        "a score is not finite": 1, "prompts differ": 3, "no assistant answer at the end": 1, "malformed row": 2, "no prompt": 1,
    }  # fmt: skip


def test_a_file_without_any_preference_is_an_error_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable preference.*'equal answers': 2"):
        read(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 2)


def test_unknown_columns_are_named_with_the_row(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"question": "q", "good": "a"}]
    with pytest.raises(DataError, match=r"pairs\.jsonl row 2: columns \['good', 'question'\].*prompt/chosen/rejected"):
        read(tmp_path, rows)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for absent in (str(tmp_path / "absent.jsonl"), "embedded:nope"):
        with pytest.raises(DataError, match=r"no such file.*embedded:helpful, embedded:harmless") as caught:
            read_preferences(absent)
        assert absent in str(caught.value)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "q"\n')
    with pytest.raises(DataError, match=r"broken\.jsonl.*not valid JSON"):
        read_preferences(str(tmp_path / "broken.jsonl"))


def preferences(num_prompts: int, per_prompt: int = 1) -> list[Preference]:
    return [
        Preference([{"role": "user", "content": f"question {p}"}], f"good {i}", f"bad {i}")
        for i in range(per_prompt)
        for p in range(num_prompts)
    ]


def prompts_of(pairs: list[Preference]) -> set[str]:
    return {pair.messages[0]["content"] for pair in pairs}


def split(pairs: list[Preference], num_train: int | None = None, num_test: int | None = None, seed: int = 0) -> tuple[list[Preference], list[Preference]]:  # fmt: skip
    train, test = split_by_prompt({"a": pairs}, num_train, num_test, seed)
    return train["a"], test["a"]


def test_all_pairs_of_a_prompt_are_on_one_side_of_the_split() -> None:
    train, test = split(preferences(20, per_prompt=3), num_test=9)
    assert not prompts_of(train) & prompts_of(test)
    assert len(prompts_of(train) | prompts_of(test)) == 20
    assert (len(train), len(test)) == (51, 9)


def test_a_prompt_held_out_of_one_set_is_held_out_of_all() -> None:
    train, test = split_by_prompt({"a": preferences(20), "b": preferences(20, per_prompt=2)[5:]}, None, 5, 0)
    held_out = prompts_of(test["a"]) | prompts_of(test["b"])
    assert not held_out & (prompts_of(train["a"]) | prompts_of(train["b"]))
    for name, total in (("a", 20), ("b", 35)):
        assert len(train[name]) + len(test[name]) == total
        assert len(test[name]) >= 5


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (36, 4)),
        ({"num_test": 10}, (30, 10)),
        ({"num_test": 10, "num_train": 5}, (5, 10)),
        ({"num_test": 39}, (1, 39)),
        ({"num_train": 1000}, (36, 4)),
    ],
)
def test_sizes_of_the_split(options: dict[str, int], sizes: tuple[int, int]) -> None:
    train, test = split(preferences(40), **options)
    assert (len(train), len(test)) == sizes


def test_at_least_one_pair_is_held_out() -> None:
    train, test = split(preferences(3))
    assert (len(train), len(test)) == (2, 1)


def test_the_split_depends_on_the_seed_alone() -> None:
    first, again, other = (split(preferences(40), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert prompts_of(first[1]) != prompts_of(other[1])


@pytest.mark.parametrize("num_test", [40, 99])
def test_too_few_pairs_for_the_split_are_an_error(num_test: int) -> None:
    with pytest.raises(DataError, match=rf"pairs 'a': 40 pairs are too few for {num_test} held out.*--num-test"):
        split(preferences(40), num_test=num_test)


def test_smaller_sets_begin_again_and_what_does_not_fit_is_counted() -> None:
    tokenizer = make_tokenizer()
    long = Preference([{"role": "user", "content": "question"}], "good " * 40, "bad")
    train: Sets = {"a": preferences(5), "b": [*preferences(2), long]}
    test: Sets = {"a": preferences(3), "b": [*preferences(1), long, long]}
    encoded = encode_sets(train, test, {"b": {"equal answers": 7}}, tokenizer, 100)
    rows = encoded.train.to_pylist()
    assert [[pair["prompt_id"] for pair in row["pairs"]] for row in rows] == [
        [prompt_id(train["a"][i].messages), prompt_id(train["b"][i % 2].messages)] for i in range(5)
    ]
    assert rows[0]["length"] == max(
        len(pair[side]["input_ids"]) for pair in rows[0]["pairs"] for side in ("chosen", "rejected")
    )
    counts = encoded.counts
    assert (counts["a"].num_train, counts["a"].num_test, counts["a"].num_repeated, counts["a"].left_out) == (5, 3, 0, {})
    assert (counts["b"].num_train, counts["b"].num_test, counts["b"].num_repeated) == (2, 1, 3)
    assert counts["b"].left_out == {"equal answers": 7, "answer longer than max_length": 3}
    assert sorted(encoded.held_out.column("set").to_pylist()) == [0, 0, 0, 1]
    assert counts["a"].length_accuracy == 1.0  # "good 0" is longer than "bad 0"
    shorter = Preference([{"role": "user", "content": "question"}], "a", "bad")
    counts = encode_sets(train, {"a": preferences(3), "b": [shorter, long]}, {}, tokenizer, 100).counts
    assert counts["b"].length_accuracy == 0.0  # of the pairs that are judged
    with pytest.raises(DataError, match=r"max_length = 8: only 0 training and 0 held-out pairs of 'a'"):
        encode_sets(train, train, {}, tokenizer, 8)


def test_margins_of_pairs_are_read_and_bad_ones_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin} for margin in (0.5, None, -1.0, float("inf"), "much")
    ]
    pairs, left_out = read(tmp_path, rows)
    assert [pair.margin for pair in pairs] == [0.5, 0.0]
    assert left_out == {"margin is not a finite number from 0 up": 2, "malformed row": 1}


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
    ],
)
def test_wilson_interval_gives_published_values(successes: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_is_symmetric_and_narrows() -> None:
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))
    wide, narrow = wilson_interval(50, 100), wilson_interval(5000, 10_000)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5


@pytest.mark.parametrize(("name", "usable", "left_out"), [("helpful", 2343, 9), ("harmless", 2307, 5)])
def test_hh_rlhf_is_read_whole(shared_data: Path, name: str, usable: int, left_out: int) -> None:
    pairs, reasons = read_preferences(str(shared_data / "hh-rlhf" / "dsp-cleaned" / f"{name}.test.json"))
    assert len(pairs) == usable
    assert reasons == {"prompts differ": left_out}
    assert all(p.messages[-1]["role"] == "user" and p.chosen != p.rejected for p in pairs)
