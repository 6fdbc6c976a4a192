"""Reads preference pairs for reward-model training from the forms they come in.

* `prompt`, `chosen`, `rejected`: strings, or lists of messages (`pairs/` of a run is of this form);
* `chosen`, `rejected`: whole transcripts ("\\n\\nHuman: … \\n\\nAssistant: …", as in hh-rlhf);
* `prompt`, `chosen`, `rejected` and `margin`: by how much the better answer's reward shall be larger, as TRL's reward trainer takes it;
* `text`, `score`: two transcripts and their scores (as in the re-formatted hh-rlhf sets).

Files are JSONL, JSON (one list) or Parquet; `embedded:helpful` and `embedded:harmless` are the demo's.
Invariant: a row that is no preference (equal scores, equal answers, different prompts) is counted, never guessed.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray.core.ids import Message
from rc_ray.errors import DataError

EMBEDDED = {name: Path(__file__).parent.parent / "demo" / f"{name}.jsonl" for name in ("helpful", "harmless")}
TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Preference:
    """One labelled pair: the conversation, and the better and the worse answer to it."""

    messages: list[Message]
    chosen: str
    rejected: str
    margin: float = 0.0
    """By how much the reward of the better one shall be larger."""


def read_preferences(path: str) -> tuple[list[Preference], Counter[str]]:
    """All usable pairs of a file in its order, and a count per reason of rows left out.

    Raises:
        DataError: no such file, not of a known form, or no usable row.
    """
    file = EMBEDDED.get(path.removeprefix("embedded:"), Path("/nonexistent")) if path.startswith("embedded:") else Path(path)
    if not file.is_file():
        raise DataError(
            f"pairs = {path!r}: no such file; give a JSONL, JSON or Parquet file, or {', '.join('embedded:' + n for n in EMBEDDED)}"
        )
    pairs: list[Preference] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(_rows(file)):
        try:
            parsed = _parse(row, f"{path} row {number + 1}")
        except (TypeError, AttributeError, KeyError, IndexError, ValueError):
            parsed = "malformed row"
        if isinstance(parsed, str):
            left_out[parsed] += 1
        else:
            pairs.append(parsed)
    if not pairs:
        raise DataError(f"pairs = {path!r}: no usable preference ({dict(left_out)})")
    return pairs, left_out


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        try:
            return list(pq.read_table(file).to_pylist())
        except pa.ArrowInvalid as error:
            raise DataError(f"pairs = {str(file)!r}: not a Parquet file: {error}") from None
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise DataError(f"pairs = {str(file)!r}: not valid JSON: {error}") from None


def _parse(row: dict[str, Any], where: str) -> Preference | str:
    if "text" in row and "score" in row:
        first, second = (float(score) for score in row["score"][:2])
        if not (math.isfinite(first) and math.isfinite(second)):
            return "a score is not finite"
        if first == second:
            return "equal scores"
        better, worse = row["text"][:2] if first > second else row["text"][1::-1]
        return _from_transcripts(better, worse)
    if "chosen" not in row or "rejected" not in row:
        raise DataError(
            f"{where}: columns {sorted(row)} are no preference; expected prompt/chosen/rejected, chosen/rejected or text/score"
        )
    if "prompt" not in row:
        return _from_transcripts(row["chosen"], row["rejected"])
    prompt = row["prompt"]
    messages = [_message("user", prompt)] if isinstance(prompt, str) else [_message(**m) for m in prompt]
    chosen, rejected = _conversation(row["chosen"]), _conversation(row["rejected"])
    before = chosen[:-1] or messages
    if not before:
        return "no prompt"
    # Where both repeat a conversation, `prompt` may be all of it, its first turns or its last.
    if chosen[:-1] != rejected[:-1] or messages not in (before[: len(messages)], before[-len(messages) :]):
        return "prompts differ"
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return "no assistant answer at the end"
    margin = float(row.get("margin") or 0.0)
    if not 0 <= margin < math.inf:
        return "margin is not a finite number from 0 up"
    better, worse = chosen[-1]["content"], rejected[-1]["content"]
    return "equal answers" if better == worse else Preference(before, better, worse, margin)


def _message(role: str, content: str, **_: Any) -> Message:
    if not isinstance(content, str):
        raise TypeError(f"content of type {type(content).__name__}")
    return {"role": role, "content": content}


def _conversation(value: Any) -> list[Message]:
    """Messages up to an answer, which may be all there is."""
    return [_message("assistant", value)] if isinstance(value, str) else [_message(**m) for m in value]


def _from_transcripts(better: str, worse: str) -> Preference | str:
    chosen, rejected = _turns(better), _turns(worse)
    if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
        return "prompts differ"
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return "no assistant answer at the end"
    if chosen[-1] == rejected[-1]:
        return "equal answers"
    return Preference(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _turns(transcript: str) -> list[Message]:
    parts = TURN.split(transcript)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]
