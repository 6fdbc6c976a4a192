"""The Arrow schemas of everything that is written: prompts, groups, pairs, drops.

Invariant: one group is one row, whatever became of it; `reward.<objective>` is aligned with `candidates`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import pyarrow as pa

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
# `policy`: name of the policy that gave it. Files of the user's own, and of earlier versions, may lack it; nothing but counts reads it.
CANDIDATE = pa.struct(
    [
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("logprob", pa.float64()),
        ("policy", pa.string()),
    ]
)
PROMPT = pa.schema([("prompt_id", pa.string()), ("prompt", MESSAGES)])
# failure/failure_detail: a drop reason that generation found (prompt_too_long, generation_failed), null otherwise.
GROUP = pa.schema([*PROMPT, ("candidates", pa.list_(CANDIDATE)), ("failure", pa.string()), ("failure_detail", pa.string())])
DROP = pa.schema([("prompt_id", pa.string()), ("reason", pa.string()), ("stage", pa.string()), ("detail", pa.string())])

# Of groups and pairs, in the schema's metadata: which tokenizers and chat templates the answers were sampled with (`template_hash`).
TEMPLATES = b"rc_ray.templates"

REWARD_PREFIX = "reward."
MISSING_PREFIX = "missing."


def reward_column(objective: str) -> str:
    """Column with the rewards of one objective: list<float32>, null where missing."""
    return REWARD_PREFIX + objective


def missing_column(objective: str) -> str:
    """Column with the reason why rewards of one objective are missing in this group, null where none is."""
    return MISSING_PREFIX + objective


def reward_fields(objectives: Iterable[str]) -> list[pa.Field]:
    """The two columns that scoring adds per objective."""
    return [
        field
        for name in objectives
        for field in (
            pa.field(reward_column(name), pa.list_(pa.float32())),
            pa.field(missing_column(name), pa.string()),
        )
    ]


def lacking_rewards(groups: pa.Table, objectives: Iterable[str]) -> list[str]:
    """Columns of these objectives' rewards that a group table does not have."""
    return [field.name for field in reward_fields(objectives) if field.name not in groups.column_names]


def with_rewards_last(groups: pa.Table, objectives: Iterable[str]) -> pa.Table:
    """A group table with the rewards that it has of these objectives behind everything else, in this order."""
    rewards = [field.name for field in reward_fields(objectives) if field.name in groups.column_names]
    return groups.select([*(name for name in groups.column_names if name not in rewards), *rewards])


def scored_objectives(schema: pa.Schema) -> list[str]:
    """Objectives whose rewards a group table has, in column order."""
    return [name.removeprefix(REWARD_PREFIX) for name in schema.names if name.startswith(REWARD_PREFIX)]


def pair_schema(objectives: Iterable[str]) -> pa.Schema:
    """TRL's conversational preference format plus where the pair comes from."""
    rewards = pa.struct([(name, pa.float32()) for name in objectives])
    return pa.schema(
        [
            ("prompt", MESSAGES),
            ("chosen", MESSAGES),
            ("rejected", MESSAGES),
            ("prompt_id", pa.string()),
            ("chosen_index", pa.int32()),
            ("rejected_index", pa.int32()),
            ("gap", pa.float64()),
            ("rewards_chosen", rewards),
            ("rewards_rejected", rewards),
            # Rewards that are higher for chosen than for rejected.
            ("agreeing", pa.list_(pa.string())),
            ("strategy", pa.string()),
        ]
    )


def templates_of(schema: pa.Schema) -> list[str]:
    """Hashes of the templates that answers were sampled with; empty where that is not known."""
    return list(json.loads((schema.metadata or {}).get(TEMPLATES, b"[]")))


def with_templates(table: pa.Table, templates: Iterable[str]) -> pa.Table:
    """The table, with these templates besides those that it knows of."""
    found = sorted({*templates_of(table.schema), *templates})
    return table.replace_schema_metadata({**(table.schema.metadata or {}), TEMPLATES: json.dumps(found)}) if found else table
