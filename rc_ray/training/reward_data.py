"""Preference sets for reward-model training: split by prompt, and as token ids.

Invariant: a prompt is either in the training or in the held-out part, in all sets alike; what had to be cut, left out or taken twice is counted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rc_ray.core.ids import prompt_id
from rc_ray.errors import DataError
from rc_ray.rewards.encoding import encode
from rc_ray.training.preferences import Preference

Sets = dict[str, list[Preference]]


@dataclass
class SetCounts:
    """What became of one set's pairs."""

    num_train: int = 0
    num_test: int = 0
    num_repeated: int = 0
    """Training pairs taken again in an epoch, since another set is larger."""
    num_prompts_cut: int = 0
    """Texts whose prompt lost its oldest part to `max_length`."""
    length_accuracy: float = 0.0
    """Accuracy of the rule "the longer answer is better" on the held-out pairs (a tie counts a half)."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows not used, by reason."""


@dataclass(frozen=True)
class Encoded:
    """Preference sets as token ids."""

    train: pa.Table
    """`pairs`: one pair of each set, in their order, as {chosen, rejected, margin}; `length`: tokens of the longest text in it."""
    held_out: pa.Table
    """`set`: index, `prompt_id`, `chosen`, `rejected`, `length`; shortest first."""
    counts: dict[str, SetCounts]


def split_by_prompt(sets: Mapping[str, list[Preference]], num_train: int | None, num_test: int | None, seed: int) -> tuple[Sets, Sets]:  # fmt: skip
    """Training and held-out pairs of every set; all pairs of one prompt go to the same part.

    Args:
        num_train: most training pairs of a set; None: all that are not held out.
        num_test: held-out pairs of a set, at least; None: a tenth of it.

    Raises:
        DataError: not enough pairs for the split asked for.
    """
    by_prompt: dict[str, dict[str, list[Preference]]] = {name: {} for name in sets}
    wanted, held_out = {}, set()
    for name, pairs in sets.items():
        for preference in pairs:
            by_prompt[name].setdefault(prompt_id(preference.messages), []).append(preference)
        order = list(by_prompt[name])
        random.Random(seed).shuffle(order)
        by_prompt[name] = {key: by_prompt[name][key] for key in order}
        wanted[name] = num_test if num_test is not None else max(1, len(pairs) // 10)
        found = 0
        for key in order:
            if found < wanted[name]:
                held_out.add(key)
                found += len(by_prompt[name][key])
    train, test = (
        {
            name: [p for key, own in groups.items() if (key in held_out) == inside for p in own]
            for name, groups in by_prompt.items()
        }
        for inside in (False, True)
    )
    for name, pairs in sets.items():
        if len(test[name]) < wanted[name] or not train[name]:
            raise DataError(
                f"pairs {name!r}: {len(pairs)} pairs are too few for {wanted[name]} held out and {num_train or 'some'} for training; "
                "lower --num-test or bring more pairs"
            )
        train[name] = train[name][:num_train]
    return train, test


def encode_sets(train: Sets, test: Sets, left_out: Mapping[str, Mapping[str, int]], tokenizer: Any, max_length: int) -> Encoded:
    """All pairs whose answers fit into `max_length` tokens.

    An epoch takes every pair of the largest set once; smaller sets begin again.

    Args:
        left_out: of each set, rows that were no preference, by reason.
        tokenizer: of the base model.
        max_length: tokens of prompt and answer; the oldest part of a longer prompt is left out, and the pair where that is not enough.

    Raises:
        DataError: a part of a set is left empty.
    """
    counts = {name: SetCounts(left_out=dict(left_out.get(name, {}))) for name in train}
    rows = {name: _encode(train[name], tokenizer, max_length, counts[name])[0] for name in train}
    judged = {name: _encode(test[name], tokenizer, max_length, counts[name]) for name in test}
    tests = {name: of_set for name, (of_set, _) in judged.items()}
    for name, count in counts.items():
        count.num_train, count.num_test = len(rows[name]), len(tests[name])
        if not rows[name] or not tests[name]:
            raise DataError(
                f"max_length = {max_length}: only {count.num_train} training and {count.num_test} held-out pairs of {name!r} have answers that fit; raise it"
            )
        pairs = judged[name][1]
        longer = [0.5 if len(p.chosen) == len(p.rejected) else float(len(p.chosen) > len(p.rejected)) for p in pairs]
        count.length_accuracy = sum(longer) / len(longer)
    largest = max(map(len, rows.values()))
    for name in rows:
        counts[name].num_repeated = largest - len(rows[name])
    steps = [[rows[name][i % len(rows[name])] for name in rows] for i in range(largest)]
    held_out = [row | {"set": number} for number, name in enumerate(tests) for row in tests[name]]
    held_out.sort(key=lambda row: int(row["length"]))
    return Encoded(
        pa.Table.from_pylist([{"pairs": pairs, "length": max(pair["length"] for pair in pairs)} for pairs in steps]),
        pa.Table.from_pylist(held_out),
        counts,
    )


def _encode(
    pairs: list[Preference], tokenizer: Any, max_length: int, counts: SetCounts
) -> tuple[list[dict[str, Any]], list[Preference]]:
    """Token ids of the pairs that fit, and these pairs."""
    rows, kept = [], []
    for p in pairs:
        try:
            sides = [encode(tokenizer, p.messages, answer, max_length) for answer in (p.chosen, p.rejected)]
        except ValueError:  # nothing of the prompt would be left
            counts.left_out["answer longer than max_length"] = counts.left_out.get("answer longer than max_length", 0) + 1
            continue
        for answer, side in zip((p.chosen, p.rejected), sides, strict=True):
            if len(side["input_ids"]) == max_length:
                counts.num_prompts_cut += len(encode(tokenizer, p.messages, answer)["input_ids"]) > max_length
        kept.append(p)
        rows.append(
            {
                "prompt_id": prompt_id(p.messages),
                "chosen": sides[0],
                "rejected": sides[1],
                "margin": p.margin,
                "length": max(len(side["input_ids"]) for side in sides),
            }
        )
    return rows, kept
