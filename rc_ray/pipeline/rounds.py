"""On-policy training in rounds: each is a run of its own, from the policy that the one before trained.

Invariant: a round begins when the one before is finished, so rounds resume as runs do; what each started from is in `rounds.json` beside them.

    rc-ray run my.yaml --set rounds=3
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rc_ray.config import Config, RoundsConfig, load_config
from rc_ray.errors import ConfigError
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline.run import ConfigSource, RunResult, run
from rc_ray.pipeline.stages import Emit

RECORD = "rounds.json"


def run_rounds(
    config: ConfigSource, overrides: Iterable[str] = (), *, fork_from: str | None = None, emit: Emit = print
) -> RunResult:
    """All rounds, or the one run where there are none. See `run`.

    Returns:
        The result of the last round, with `rounds` in its metrics: what each started from and how held-out rewards moved.
    """
    resolved = load_config(config, overrides)
    rounds = resolved.rounds
    result: RunResult | None = None
    if rounds.number == 1:
        result = run(resolved, fork_from=fork_from, emit=emit)
        assert result is not None
        return result
    if fork_from is not None:
        raise ConfigError(
            f"--fork-from = {fork_from!r}: rounds cannot begin with another run's candidates; fork the first round alone"
        )
    folder = Folder.at(resolved.output)
    records: list[dict[str, Any]] = []
    model: str | None = None
    for number in range(1, rounds.number + 1):
        one = round_config(resolved, number, model)
        reference = one.training.reference.model or one.model
        emit(f"round     {number} of {rounds.number}: from {one.model}, reference {reference}")
        result = run(one, emit=emit)
        assert result is not None
        records.append(
            {
                "round": number,
                "run": result.run_dir,
                "model": one.model,
                "reference": reference,
                "identity": {key: result.metrics["identity"][key] for key in ("prompts", "pairs", "dropped")},
                "rewards": _rewards(result.metrics),
            }
        )
        why = _why_last(result.metrics, rounds)
        folder.write_json(RECORD, {"rounds": records, "ended": why})
        emit(f"round     {number} of {rounds.number} finished{_moved(records[-1])}")
        if why is not None and number < rounds.number:
            emit(f"round     no further one: {why}")
            break
        model = result.model
    assert result is not None
    return RunResult(result.run_dir, {**result.metrics, "rounds": records})


def round_config(config: Config, number: int, model: str | None) -> Config:
    """The configuration of one round.

    Args:
        number: from 1 on; adds to the seed, so that each round samples other answers.
        model: folder of the policy that the round before trained; None in the first.
    """
    changes: dict[str, Any] = {
        "output": (Folder.at(config.output) / f"round-{number}").uri,
        "seed": config.seed + number - 1,
        "rounds": RoundsConfig(),
    }
    if model is not None:
        changes |= {"model": model, "revision": None}
        if config.rounds.reference == "initial":
            own = {"model": config.model, "revision": config.revision, "trust_remote_code": config.trust_remote_code}
            reference = config.training.reference.model_copy(update=own)
            changes["training"] = config.training.model_copy(update={"reference": reference})
    return config.model_copy(update=changes)


def _rewards(metrics: dict[str, Any]) -> dict[str, Any]:
    objectives = metrics.get("evaluation", {}).get("objectives", {})
    return {name: {key: found[key]["mean"] for key in ("before", "after", "difference")} for name, found in objectives.items()}


def _why_last(metrics: dict[str, Any], rounds: RoundsConfig) -> str | None:
    """Why no further round may begin, or None."""
    if "training" not in metrics:
        return "this one ended before training (budget); raise the budget and run it again"
    if rounds.max_reward_drop is not None:
        for name, found in _rewards(metrics).items():
            if found["difference"] < -rounds.max_reward_drop:
                return (
                    f"the held-out reward of {name} fell by {-found['difference']:.4g}, more than rounds.max_reward_drop = {rounds.max_reward_drop:g}; "
                    "the policy that this round started from is the last one before the fall"
                )
    return None


def _moved(record: dict[str, Any]) -> str:
    parts = [f"{name} {found['before']:.3f} -> {found['after']:.3f}" for name, found in record["rewards"].items()]
    return f": {', '.join(parts)}" if parts else ""
