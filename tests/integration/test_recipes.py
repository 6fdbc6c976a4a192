"""Every recipe trains on two workers, lowers its own loss, and moves the policy where its objectives want it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest

from rc_ray.config import load_config
from rc_ray.config.training import Recipe
from rc_ray.errors import ConfigError, DataError
from rc_ray.ledger.storage import Folder
from rc_ray.training.recipes import RECIPES
from tests.integration.conftest import NUM_PAIRS, preference, train

OPTIONS: dict[str, dict[str, Any]] = {
    "modpo": {"primary": "kind", "weights": {"kind": 0.8, "brief": 0.2}},
    "raco": {"weights": {"kind": 3, "brief": 1}},
}


@pytest.mark.parametrize("recipe", get_args(Recipe))
def test_a_recipe_lowers_its_own_loss(
    recipe: str, tiny_policy: Path, objective_pairs: Path, tmp_path: Path, board: Any
) -> None:
    facts = train(tiny_policy, objective_pairs, tmp_path, board, recipe=recipe, **OPTIONS.get(recipe, {}))
    losses = [entry["loss"] for entry in facts["log_history"] if "loss" in entry]
    stages = 2 if recipe in ("sequential", "soup") else 1
    steps = len(losses) // stages
    assert steps * stages == len(losses)
    for stage in range(stages):
        own = losses[stage * steps : (stage + 1) * steps]
        third = len(own) // 3
        assert sum(own[-third:]) < sum(own[:third]), own
    assert_own_loss(recipe, [entry for entry in facts["log_history"] if "loss" in entry])
    assert facts["num_pairs"] == (2 if recipe == "reward_augmented" else 1) * NUM_PAIRS
    assert facts["recipe"] == recipe
    assert not (tmp_path / "work").exists()
    before, after = preference(tiny_policy), preference(tmp_path / "model")
    if recipe == "reward_augmented":  # without a goal in the prompt, neither answer is better
        assert (tmp_path / "model" / "model.safetensors").exists()
    else:
        assert after > before + 0.1
    if recipe in ("mix", "soup", "raco"):  # where `brief` prefers the other answer, it holds against it
        before, brief = (preference(folder, "be brief, 98") for folder in (tiny_policy, tmp_path / "model"))
        assert brief - before < after - preference(tiny_policy) - 0.1


def assert_own_loss(recipe: str, logs: list[dict[str, Any]]) -> None:
    """The logged losses are those of the recipe, and not DPO's on the same pairs, which begins at log 2."""
    if recipe == "modpo":
        assert abs(logs[0]["loss"] - math.log(2)) > 5e-3, "no margins"
    elif recipe in ("mix", "raco"):
        weights = {"kind": 0.75, "brief": 0.25} if recipe == "raco" else {"kind": 0.5, "brief": 0.5}
        mixed = [sum(weight * entry[f"loss/{name}"] for name, weight in weights.items()) for entry in logs]
        losses = [entry["loss"] for entry in logs]
        if recipe == "mix":
            assert losses == pytest.approx(mixed, abs=1e-4)
        else:
            assert all(loss > 1.01 * each for loss, each in zip(losses, mixed, strict=True)), (
                "no step is turned away from conflicts"
            )
        assert abs(logs[-1]["loss/kind"] - logs[-1]["loss/brief"]) > 1e-3, "both objectives have the same order"
    else:
        assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert "loss/kind" not in logs[0]


def test_a_soup_is_the_mean_of_its_policies(tiny_policy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from rc_ray.training.dpo import average
    from tests.conftest import make_llama

    other = make_llama(tmp_path / "other", seed=8)
    average([Folder.at(tiny_policy), Folder.at(other)], [0.25, 0.75], Folder.at(tmp_path / "soup"))
    a, b, mean = (load_file(folder / "model.safetensors") for folder in (tiny_policy, other, tmp_path / "soup"))
    assert set(a) == set(mean)
    assert all((0.25 * a[name] + 0.75 * b[name] - mean[name]).abs().max() < 1e-6 for name in a)


def test_names_that_the_pairs_do_not_have_are_refused(
    tiny_policy: Path, objective_pairs: Path, tmp_path: Path, board: Any
) -> None:
    with pytest.raises(ConfigError, match=r"training\.weights: the pairs have no rewards for 'wit'; they have brief, kind"):
        train(tiny_policy, objective_pairs, tmp_path, board, recipe="mix", weights={"kind": 1, "wit": 1})
    bare = tmp_path / "bare"
    bare.mkdir()
    pq.write_table(pq.read_table(objective_pairs / "a.parquet", columns=["prompt", "chosen", "rejected"]), bare / "a.parquet")
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
        ({"recipe": "raco", "num_workers": 2, "per_device_batch_size": 2}, r"gradients of a whole step.* \(32 / 2\)"),
        ({"recipe": "raco", "num_workers": 2, "per_device_batch_size": 16, "min_workers": 1}, "leave min_workers out"),
        ({"merge_adapter": False}, "merge_adapter has no effect without lora_rank"),
        ({"lora_rank": 4, "merge_adapter": False, "recipe": "soup"}, "merge_adapter must be true for recipe soup"),
        ({"num_workers": 2, "min_workers": 3}, r"min_workers \(3\) is above num_workers"),
        ({"num_workers": 4, "min_workers": 2}, r"with 3 workers the global_batch_size \(32\) is not a multiple of 3 x"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(training: dict[str, Any], message: str) -> None:
    rule = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 3}}
    with pytest.raises(ConfigError, match=message):
        load_config(
            {"model": "m/m", "output": "o", "prompts": {"path": "p"}, "rewards": {"a": rule, "b": rule}, "training": training}
        )
