"""Every recipe trains on two workers, lowers its own loss, and moves the policy where its objectives want it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.config import load_config
from rc_ray.config.schema import Recipe
from rc_ray.errors import ConfigError, DataError
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline.cluster import connected
from rc_ray.training.dpo import train_dpo
from rc_ray.training.recipes import RECIPES

NUM_PAIRS = 24
ANSWERS = ("hello", "you are")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def train(policy: Path, pairs: Path, folder: Path, board: Any, **training: Any) -> dict[str, Any]:
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
    at = [Folder.at(folder / name) for name in ("model", "work", "cache")]
    return train_dpo(config, Folder.at(pairs), at[0], at[1], 1.0, 0.0, board, at[2])


def preference(folder: Path) -> float:
    """log p(first answer) - log p(second), of a prompt that was not trained on."""
    from rc_ray.rewards.language_model import LanguageModel

    model = LanguageModel(str(folder), None, False, "float32", False, 4096)
    first, second = model.logprobs([[{"role": "user", "content": "question 99"}]] * 2, list(ANSWERS))
    assert first.value is not None
    assert second.value is not None
    return first.value - second.value


OPTIONS: dict[str, dict[str, Any]] = {
    "modpo": {"primary": "kind", "weights": {"kind": 0.8, "brief": 0.2}},
    "raco": {"weights": {"kind": 3, "brief": 1}},
}


@pytest.mark.parametrize("recipe", get_args(Recipe))
def test_a_recipe_lowers_its_own_loss(recipe: str, tiny_policy: Path, pairs: Path, tmp_path: Path, board: Any) -> None:
    facts = train(tiny_policy, pairs, tmp_path, board, recipe=recipe, **OPTIONS.get(recipe, {}))
    losses = [entry["loss"] for entry in facts["log_history"] if "loss" in entry]
    stages = 2 if recipe in ("sequential", "soup") else 1
    steps = len(losses) // stages
    assert steps * stages == len(losses)
    for stage in range(stages):
        own = losses[stage * steps : (stage + 1) * steps]
        third = len(own) // 3
        assert sum(own[-third:]) < sum(own[:third]), own
    assert facts["recipe"] == recipe
    assert not (tmp_path / "work").exists()
    before, after = preference(tiny_policy), preference(tmp_path / "model")
    if recipe == "reward_augmented":  # without a goal in the prompt, neither answer is better
        assert (tmp_path / "model" / "model.safetensors").exists()
    else:
        assert after > before + 0.1


def test_a_soup_is_the_mean_of_its_policies(tiny_policy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from rc_ray.training.dpo import average
    from tests.conftest import make_llama

    other = make_llama(tmp_path / "other", seed=8)
    average([Folder.at(tiny_policy), Folder.at(other)], [0.25, 0.75], Folder.at(tmp_path / "soup"))
    a, b, mean = (load_file(folder / "model.safetensors") for folder in (tiny_policy, other, tmp_path / "soup"))
    assert set(a) == set(mean)
    assert all((0.25 * a[name] + 0.75 * b[name] - mean[name]).abs().max() < 1e-6 for name in a)


def test_names_that_the_pairs_do_not_have_are_refused(tiny_policy: Path, pairs: Path, tmp_path: Path, board: Any) -> None:
    with pytest.raises(ConfigError, match=r"training\.weights: the pairs have no rewards for 'wit'; they have brief, kind"):
        train(tiny_policy, pairs, tmp_path, board, recipe="mix", weights={"kind": 1, "wit": 1})
    bare = tmp_path / "bare"
    bare.mkdir()
    pq.write_table(pq.read_table(pairs / "a.parquet", columns=["prompt", "chosen", "rejected"]), bare / "a.parquet")
    with pytest.raises(DataError, match=r"has no column rewards_chosen, rewards_rejected.*recipe mix"):
        train(tiny_policy, bare, tmp_path, board, recipe="mix")


def test_recipes_are_listed_with_a_line_each() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rc_ray", "train", "--list-recipes"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(RECIPES) == list(get_args(Recipe))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"recipe": "modpo"}, "needs primary"),
        ({"recipe": "dpo", "weights": {"a": 1}}, "weights has no effect on recipe dpo"),
        ({"recipe": "mix", "conflict": 0.1}, "conflict has no effect on recipe mix"),
        ({"recipe": "mix", "weights": {"a": -1}}, "must not be negative"),
        ({"recipe": "modpo", "primary": "a", "weights": {"b": 1}}, "divides by the weight of its primary objective"),
        ({"recipe": "raco", "loss_type": "ipo"}, "has a loss of its own"),
    ],
)
def test_options_that_do_not_fit_the_recipe_are_refused(training: dict[str, Any], message: str) -> None:
    rule = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 3}}
    with pytest.raises(ConfigError, match=message):
        load_config(
            {"model": "m/m", "output": "o", "prompts": {"path": "p"}, "rewards": {"a": rule, "b": rule}, "training": training}
        )
