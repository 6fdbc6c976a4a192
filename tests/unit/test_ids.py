"""Ids and seeds: fixed values, what they depend on, and what they do not."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from rc_ray.core.ids import bad_row_id, candidate_seed, canonical_json, prompt_id

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界 😀?"}]


def test_prompt_id_is_a_fixed_function_of_role_and_content() -> None:
    text = json.dumps(
        [{"content": m["content"], "role": m["role"]} for m in MESSAGES], separators=(",", ":"), ensure_ascii=False
    )
    expected = hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()
    assert prompt_id(MESSAGES) == expected
    # The literal value guards run directories that exist already: a change here would orphan them.
    assert prompt_id([{"role": "user", "content": "hello"}]) == "8f98bb6e1e780637e93de3de688851ac"


def test_prompt_id_ignores_key_order_and_extra_keys() -> None:
    turned = [{"content": m["content"], "name": "someone", "role": m["role"]} for m in MESSAGES]
    assert prompt_id(turned) == prompt_id(MESSAGES)


def test_prompt_id_changes_with_content_role_and_order() -> None:
    system, user = MESSAGES
    variants = [
        MESSAGES,
        [user, system],
        [user],
        [system, {**user, "content": user["content"] + " "}],
        [{**system, "role": "user"}, user],
    ]
    assert len({prompt_id(v) for v in variants}) == len(variants)


def test_ids_are_32_hex_digits() -> None:
    for identity in (prompt_id(MESSAGES), bad_row_id("file.jsonl", 3, None)):
        assert len(identity) == 32
        assert int(identity, 16) >= 0


def test_canonical_json_sorts_keys_keeps_unicode_and_escapes_lone_surrogates() -> None:
    assert canonical_json({"b": 1, "a": ["é", None]}) == '{"a":["é",null],"b":1}'
    assert canonical_json("x\ud83d") == '"x\\ud83d"'


def test_bad_row_id_takes_any_value_and_tells_rows_apart() -> None:
    values = ["\ud83d", {"nested": ["\udfff"]}, None, 42, float("nan"), b"bytes", {1, 2}]
    identities = [bad_row_id("file.jsonl", row, value) for row, value in enumerate(values)]
    assert len(set(identities)) == len(values)
    assert bad_row_id("file.jsonl", 0, "\ud83d") == identities[0]
    assert bad_row_id("file.jsonl", 1, "\ud83d") != identities[0]
    assert bad_row_id("other.jsonl", 0, "\ud83d") != identities[0]


def test_candidate_seed_is_48_bits_and_depends_on_run_seed_and_prompt() -> None:
    seeds = {candidate_seed(run_seed, prompt) for run_seed in (0, 1) for prompt in ("aa", "ab")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**48 for seed in seeds)
    assert candidate_seed(0, "aa") == int(hashlib.blake2b(b"0:aa", digest_size=6).hexdigest(), 16)


def test_seeds_of_20000_prompts_leave_room_for_64_candidates_each() -> None:
    seeds = np.sort(np.array([candidate_seed(0, prompt_id([{"role": "user", "content": str(i)}])) for i in range(20_000)]))
    assert np.diff(seeds).min() > 64
    # They fill the range, so the 48 bits are really used.
    assert seeds[-1] - seeds[0] > 0.99 * 2**48
