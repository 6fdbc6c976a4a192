"""What is said of a training: curves in words, and whether both answers became less likely."""

from __future__ import annotations

from typing import Any

import pytest

from rc_ray.config import load_config
from rc_ray.training.card import model_card
from rc_ray.training.curves import WINDOW, live_words, logp_changes, training_remarks


def history(chosen: float, rejected: float, steps: int = WINDOW) -> list[dict[str, Any]]:
    early = [{"rewards/chosen": 9.0, "rewards/rejected": 9.0}] * 5
    return [*early, *[{"loss": 0.5, "rewards/chosen": chosen, "rewards/rejected": rejected}] * steps, {"train_runtime": 3.0}]


def test_changes_are_of_the_last_steps_and_in_nats() -> None:
    assert logp_changes(history(-0.2, -0.6), beta=0.1) == pytest.approx({"chosen": -2.0, "rejected": -6.0})
    assert logp_changes([{"train_runtime": 1.0}], beta=0.1) is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "warned"), [(-0.1, -0.2, True), (0.1, -0.2, False), (0.1, 0.2, False), (-0.1, 0.2, False)]
)
def test_a_fall_of_both_is_said(chosen: float, rejected: float, warned: bool) -> None:
    lines = training_remarks({"logp_changes": logp_changes(history(chosen, rejected), 0.1)})
    assert len(lines) == warned
    assert not warned or "-1.00 nats) and rejected answers (-2.00) both fell" in lines[0]


def test_one_step_in_words() -> None:
    step = {"loss": 0.61234, "rewards/accuracies": 0.75, "num_tokens": 3}
    assert live_words([step], beta=0.1) == "loss 0.612  accuracy 0.75"
    falling = history(-0.2, -0.6)[:-1]
    assert live_words(falling, beta=0.1) == "loss 0.5  both log-probs fall"
    assert live_words([*falling, {"loss": 0.4, "rewards/chosen": 9.0, "rewards/rejected": -0.6}], beta=0.1) == "loss 0.4"


def test_the_card_names_what_the_policy_came_from() -> None:
    rule = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 3}}
    config = load_config(
        {
            "model": "org/policy", "revision": "abc", "output": "o", "prompts": {"path": "p"}, "rewards": {"a": rule, "b": rule},
            "training": {"beta": 0.3, "recipe": "raco", "per_device_batch_size": 16, "conflict": 0.2},
        }
    )  # fmt: skip
    facts = {
        "num_pairs": 7, "repeated": 1, "steps": 4, "data_fingerprint": "d4", "reference": "hub:abc", "remarks": ["mind this"],
        "log_history": history(0.1, -0.1), "logp_changes": {"chosen": 1.0, "rejected": -1.0},
    }  # fmt: skip
    card = model_card(config, facts)
    for text in (
        "raco", "`org/policy` at revision `abc`", "7, of which 1 twice", "`d4`", "`hub:abc`", "| beta | `0.3` (set) |", "| conflict | `0.2` (set) |",
        "| warmup_steps | `0` |", "| loss in the last step | 0.5 |", "mind this", "+1.000", "rc-ray", "trl 1.",
    ):  # fmt: skip
        assert text in card, text
    assert "lora" not in card
