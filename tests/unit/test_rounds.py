"""On-policy rounds: the configuration of each, when no further one begins, and what is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from rc_ray.config import RoundsConfig, fingerprint, load_config
from rc_ray.errors import ConfigError
from rc_ray.pipeline.rounds import _why_last, round_config
from rc_ray.pipeline.run import run
from tests.unit.test_config import GOOD


def config_with(rounds: Any, **changes: Any) -> Any:
    return load_config(copy.deepcopy(GOOD) | {"rounds": rounds} | changes)


def test_each_round_is_a_run_from_the_policy_before() -> None:
    config = config_with(3)
    assert config.rounds == RoundsConfig(number=3)
    first, second = round_config(config, 1, None), round_config(config, 2, "o/round-1/model")
    assert (first.model, first.seed, first.training.reference.model) == (config.model, config.seed, None)
    assert (second.model, second.seed, second.training.reference.model) == ("o/round-1/model", config.seed + 1, None)
    assert (first.output, second.output) == tuple(str(Path(config.output, f"round-{n}").absolute()) for n in (1, 2))
    assert fingerprint(first) == fingerprint(load_config(GOOD)), "the first round is the run without rounds"
    assert load_config(second) == second


def test_the_first_policy_may_stay_the_reference() -> None:
    config = config_with({"number": 2, "reference": "initial"}, revision="abc", trust_remote_code=True)
    assert round_config(config, 1, None).training.reference.model is None
    reference = round_config(config, 2, "o/round-1/model").training.reference
    assert (reference.model, reference.revision, reference.trust_remote_code) == (config.model, "abc", True)


@pytest.mark.parametrize(("drop", "why"), [(None, None), (0.2, None), (0.1, r"the held-out reward of b fell by 0\.15")])
def test_a_fall_of_an_objective_ends_it(drop: float | None, why: str | None) -> None:
    means = {"a": 0.4, "b": -0.15}
    objectives = {name: {key: {"mean": mean} for key in ("before", "after", "difference")} for name, mean in means.items()}
    found = _why_last({"training": {}, "evaluation": {"objectives": objectives}}, RoundsConfig(number=2, max_reward_drop=drop))
    assert found is None if why is None else re.search(why, str(found))


def test_a_round_that_a_budget_ended_is_the_last() -> None:
    assert "ended before training" in str(_why_last({}, RoundsConfig(number=2)))


@pytest.mark.parametrize(
    ("rounds", "changes", "message"),
    [
        (2, {"training": {"enabled": False}}, "training.enabled is false"),
        (2, {"training": {"lora_rank": 4, "merge_adapter": False}}, "goes on with a whole policy"),
        ({"reference": "initial"}, {}, r"rounds\.reference has no effect on one round"),
        ({"number": 2, "max_reward_drop": 0.1}, {"evaluation": {}}, "needs held-out rewards"),
        ({"number": 2, "reference": "initial"}, {"training": {"reference": {"model": "m/m"}}}, "which is taken in every round"),
        ({"number": 2, "reference": "initial"}, {"training": {"recipe": "sequential"}}, "references are the policies before"),
        (0, {}, r"rounds\.number = 0"),
        (1, {"seed": 1 << 32}, r"seed = 4294967296"),
        (3, {"seed": (1 << 32) - 2}, r"the last round's seed, 4294967296, "),
    ],
)
def test_rounds_that_cannot_be_are_refused(rounds: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(rounds, **changes)


def test_a_stage_is_of_one_round() -> None:
    with pytest.raises(ConfigError, match=r"give the run directory of that round, .*/round-N"):
        run(config_with(2), only="train")
