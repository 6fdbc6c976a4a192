"""Trainings on pairs whose objectives disagree, for recipes and other options of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.config import load_config
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline.cluster import connected

NUM_PAIRS = 24
ANSWERS = ("hello", "you are")


@pytest.fixture(scope="session")
def objective_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`kind` always prefers the first answer; `brief` the second one where the prompt says so, and in the first pair neither."""
    folder = tmp_path_factory.mktemp("recipes") / "pairs"
    folder.mkdir()
    rewards = pa.struct([("kind", pa.float32()), ("brief", pa.float32())])
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{'be brief, ' if i % 3 == 2 else 'question'} {i}"}],
            "chosen": [{"role": "assistant", "content": ANSWERS[0]}],
            "rejected": [{"role": "assistant", "content": ANSWERS[1]}],
            "rewards_chosen": {"kind": 1.0, "brief": 0.0 if i % 3 == 2 else 1.0},
            "rewards_rejected": {"kind": 0.0, "brief": 1.0 if i in (0, *range(2, NUM_PAIRS, 3)) else 0.0},
        }
        for i in range(NUM_PAIRS)
    ]
    table = pa.table({key: [row[key] for row in rows] for key in ("prompt", "chosen", "rejected")})
    for key in ("rewards_chosen", "rewards_rejected"):
        table = table.append_column(key, pa.array([row[key] for row in rows], rewards))
    pq.write_table(table, folder / "a.parquet")
    return folder


@pytest.fixture(scope="module")
def board() -> Iterator[Any]:
    from rc_ray.config import ClusterConfig
    from rc_ray.pipeline.progress import start_board

    with connected(ClusterConfig()):
        yield start_board()


def train(policy: Path, pairs: Path, folder: Path, board: Any, num_cpus: float = 1.0, **training: Any) -> dict[str, Any]:
    options = {
        "num_workers": 2,
        "global_batch_size": 4,
        "per_device_batch_size": 2,
        "learning_rate": 1e-3,
        "num_epochs": 2,
        **training,
    }
    rule = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 3}}
    config = load_config(
        {
            "model": str(policy),
            "output": str(folder),
            "prompts": {"path": "p"},
            "rewards": {"kind": rule, "brief": rule},
            "training": options,
        }
    )
    from rc_ray.training.dpo import train_dpo

    at = [Folder.at(folder / name) for name in ("model", "work", "cache")]
    return train_dpo(config, Folder.at(pairs), at[0], at[1], num_cpus, 0.0, board, at[2])


def preference(folder: Path, prompt: str = "question 99") -> float:
    """log p(first answer) - log p(second), of a prompt that was not trained on."""
    from rc_ray.rewards.language_model import LanguageModel

    model = LanguageModel(str(folder), None, False, "float32", False, 4096)
    first, second = model.logprobs([[{"role": "user", "content": prompt}]] * 2, list(ANSWERS))
    assert first.value is not None
    assert second.value is not None
    return first.value - second.value
