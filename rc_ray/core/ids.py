"""Ids and seeds, derived from content alone.

Invariant: the same prompt under the same run seed gets the same id and asks vLLM for the same random streams, whatever the
order of rows, the number of actors, or the number of restarts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, str]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, non-ASCII kept, lone surrogates escaped."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=repr)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def prompt_id(messages: Sequence[Message]) -> str:
    """32 hex digits of BLAKE2b over the canonical JSON of the messages, only `role` and `content` of each."""
    canonical = canonical_json([{"role": m["role"], "content": m["content"]} for m in messages])
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def bad_row_id(source: str, row: int, value: Any) -> str:
    """Id of a row that holds no prompt: 32 hex digits over its source, row number and value."""
    return hashlib.blake2b(canonical_json([source, row, value]).encode(), digest_size=16).hexdigest()


def candidate_seed(run_seed: int, prompt: str) -> int:
    """48-bit seed of a prompt's first candidate; candidate i uses this plus i, as vLLM does for child i of `n`."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}:{prompt}".encode(), digest_size=6).digest(), "big")
