"""A new run that begins with what is still valid of an old one: `rc-ray run my.yaml --fork-from runs/old`.

Candidates are taken over when everything that they depend on is equal (prompts, policy, seed, sampling), and with them the
rewards of each objective that is configured as it was. So a run with another selection samples and scores nothing, and one with
another reward model scores that objective only. The old run is not changed; it may be unfinished.

Invariant: data files are copied before the commit records that make them count, so a fork that is killed is continued by the
same command, or by a run without it, which does again what was not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rc_ray.config import Config, differences, result_fields
from rc_ray.errors import ConfigError, ResumeError
from rc_ray.ledger import rundir
from rc_ray.ledger.ledger import chunk_name
from rc_ray.ledger.rundir import RunDir
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline.actors import count_paired
from rc_ray.pipeline.policies import model_names
from rc_ray.pipeline.stages import PROMPTS, SAMPLE, SCORE

# What decides which candidates are sampled.
SAMPLING = ("model", "revision", "trust_remote_code", "seed", "prompts", "generation")


def fork(source: str, config: Config, hashes: dict[str, str], emit: Callable[[str], None] = print) -> RunDir:
    """Makes the run directory of a configuration and copies into it what is valid of another run.

    Args:
        source: the other run directory.
        config: of the new run; `output` must be new, or an earlier fork.
        hashes: of its data, see `stages.check`.

    Raises:
        DataError: source is no run directory. ConfigError: nothing of it can be reused. ResumeError: see `rundir.check_owner`; or the new
            run had begun with other chunks.
    """
    old = rundir.open_existing(source)
    manifest = old.manifest()
    before, now = old.result_fields(), result_fields(config)
    kept = _check(before, now, manifest["data_hashes"], hashes, source)
    run = rundir.create(config, hashes)
    if run.ledger.is_finished(PROMPTS) and run.ledger.facts(PROMPTS) != old.ledger.facts(PROMPTS):
        raise ResumeError(
            f"output = {config.output!r}: its prompts are split into other chunks than those of {source!r}; give a new output"
        )
    run.update_manifest(forked_from={"run": old.root.uri, "fingerprint": manifest["fingerprint"]})
    if "models" in manifest:  # the run refuses to go on where a model is another one by now
        names = model_names(config, kept)
        run.update_manifest(models={name: value for name, value in manifest["models"].items() if name in names})
    if "engines" in manifest:
        run.update_manifest(engines=manifest["engines"])
    if not run.ledger.is_finished(PROMPTS):
        _copy(old.prompts, run.prompts, old.prompts.names(".parquet"))
        _copy(old.drops, run.drops, ["prompts.parquet"])
        run.ledger.finish(PROMPTS, old.ledger.facts(PROMPTS))
    sampled, scored = old.ledger.done(SAMPLE), old.ledger.done(SCORE)
    all_rewards = kept == list(now["rewards"]) and now["rewards"].keys() == before["rewards"].keys()
    of_stages = {name: scored | old.ledger.done(f"{SCORE}_{name}") for name in kept}
    for chunk in sorted(sampled - run.ledger.done(SAMPLE)):
        record = f"{chunk_name(chunk)}.json"
        _copy(old.candidates, run.candidates, [f"{chunk_name(chunk)}.parquet"])
        _copy(old.ledger.folder / SAMPLE, run.ledger.folder / SAMPLE, [record])
        whole = all_rewards and chunk in scored
        for name in kept if not whole else ():
            if chunk in of_stages[name]:
                (run.ledger.folder / f"{SCORE}_{name}").write_json(record, {"groups": 0})
        if whole:
            counts = (old.ledger.folder / SCORE).read_json(record)
            if before["selection"] != now["selection"]:
                counts.pop("paired", None)
            if "paired" not in counts and config.budget.target_pairs is not None:
                counts["paired"] = count_paired(run.candidates.read_table(f"{chunk_name(chunk)}.parquet"), config.selection)
            (run.ledger.folder / SCORE).write_json(record, counts)
    emit(
        f"fork      {len(sampled)} chunks of candidates from {old.root.uri}, rewards kept: "
        f"{'all' if all_rewards else ', '.join(kept) or 'none'}"
    )
    return run


def _check(
    before: dict[str, Any], now: dict[str, Any], old_hashes: dict[str, str], new_hashes: dict[str, str], source: str
) -> list[str]:
    """The objectives whose rewards are still valid.

    Raises:
        ConfigError: the candidates are not.
    """
    changed = [line for key in SAMPLING for line in differences(before.get(key), now.get(key), f"{key}.")]
    if old_hashes[PROMPTS] != new_hashes[PROMPTS]:
        changed.append(f"content of prompts: {old_hashes[PROMPTS]} -> {new_hashes[PROMPTS]}")
    # An earlier version recorded no code.
    other_code = [
        key for key, value in new_hashes.items() if key.startswith("rewards.") and old_hashes.get(key, value) != value
    ]
    if now["generation"]["max_candidates"] is not None:  # then rewards and selection decide how many candidates there are
        changed += [f"content of {key}: {old_hashes[key]} -> {new_hashes[key]}" for key in other_code]
        changed += [line for key in ("rewards", "selection") for line in differences(before[key], now[key], f"{key}.")]
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(f"--fork-from {source!r}: its candidates are not those that this configuration samples:\n{lines}")
    changed_code = {key.split(".")[1] for key in other_code}
    return [
        name for name, reward in now["rewards"].items() if before["rewards"].get(name) == reward and name not in changed_code
    ]


def _copy(source: Folder, target: Folder, names: list[str]) -> None:
    for name in names:
        target.write_bytes(name, source.read_bytes(name))
