"""Reads a configuration: YAML file or mapping, plus `--set a.b=value` overrides, into a frozen `Config`.

Invariant: what is wrong is said for all fields at once, each with field, value, reason and what to do, before anything starts.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rc_ray.config.reward_training import RewardTrainingConfig
from rc_ray.config.schema import Config
from rc_ray.config.selection import SelectionConfig
from rc_ray.errors import ConfigError

EMBEDDED_CONFIGS = {"embedded:demo": Path(__file__).parent.parent / "demo" / "demo.yaml"}
# A value under such a name is not repeated in a message.
SECRET_NAME = re.compile(r"token$|secret|password|api_?key", re.IGNORECASE)
M = TypeVar("M", bound=BaseModel)


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = ()) -> Config:
    """Returns the validated configuration.

    Args:
        source: path of a YAML file, `embedded:demo`, a mapping, or a `Config`.
        overrides: `a.b.c=value` strings; the value is read as YAML.

    Raises:
        ConfigError: file missing, not YAML, unknown key, wrong type, impossible combination.
    """
    if isinstance(source, Config):
        raw: Any = source.model_dump(mode="json", exclude_unset=True)
    elif isinstance(source, Mapping):
        raw = json.loads(json.dumps(source, default=str))
    else:
        raw = _read_yaml(EMBEDDED_CONFIGS.get(str(source), Path(source)))
    for override in overrides:
        _apply_override(raw, override)
    return _validated(Config, raw, "the configuration is")


def load_selection(source: str | Path | Config | None, overrides: Iterable[str] = ()) -> SelectionConfig:
    """The selection section alone, for data that are scored already.

    Args:
        source: a configuration as for `load_config`, of which the other sections are not looked at; None for defaults.
        overrides: `selection.key=value` strings.

    Raises:
        ConfigError: as `load_config`; an override of another section.
    """
    if isinstance(source, Config):
        section: Any = source.selection.model_dump(mode="json", exclude_unset=True)
    elif source is None:
        section = {}
    else:
        section = _read_yaml(EMBEDDED_CONFIGS.get(str(source), Path(source))).get("selection") or {}
    raw = {"selection": section}
    for override in overrides:
        if not override.startswith("selection."):
            raise ConfigError(f"--set {override!r} has no effect on a selection from --input; use --set selection.KEY=VALUE")
        _apply_override(raw, override)
    return _validated(SelectionConfig, raw["selection"], "the configuration is", "selection")


def load_reward_training(values: Mapping[str, Any] | RewardTrainingConfig) -> RewardTrainingConfig:
    """The options of a reward-model training.

    Raises:
        ConfigError: unknown key, wrong type, impossible combination.
    """
    if isinstance(values, RewardTrainingConfig):
        return values
    return _validated(RewardTrainingConfig, dict(values), "the options are")


def _validated(model: type[M], raw: Any, subject: str, section: str | None = None) -> M:
    """What pydantic makes of the values of a configuration, or of a section of one."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        above, root = ((section,), Config) if section else ((), model)
        details = (ErrorDetails(**{**detail, "loc": (*above, *detail["loc"])}) for detail in error.errors())
        lines = "\n".join(f"  {_explain(detail, root)}" for detail in details)
        raise ConfigError(f"{subject} not valid:\n{lines}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"configuration file {str(path)!r} does not exist; give the path of a YAML file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration file {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"configuration file {str(path)!r} must hold a mapping at its top, not {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} must be KEY=VALUE, e.g. --set generation.num_candidates=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section")
        node = child
    node[last] = value


def _explain(detail: ErrorDetails, root: type[BaseModel]) -> str:
    # The union of reward kinds puts its tag after the objective's name; it is not a key that the user wrote.
    location = [str(part) for number, part in enumerate(detail["loc"]) if (number, detail["loc"][0]) != (2, "rewards")]
    field = ".".join(location) or "configuration"
    value = detail.get("input")
    hidden = isinstance(value, (Mapping, BaseModel)) or (bool(location) and SECRET_NAME.search(location[-1]) is not None)
    shown = "" if hidden else f" = {value!r}"
    if detail["type"] == "extra_forbidden":
        return f"{field}{shown}: unknown key. {_suggest(location, root)}"
    if detail["type"] == "missing":
        return f"{field}: missing; add it to the configuration."
    message = detail["msg"].removeprefix("Value error, ")
    description = _description(location, root)
    return f"{field}{shown}: {message[0].lower() + message[1:]}." + (f" ({field}: {description})" if description else "")


def _suggest(location: list[str], root: type[BaseModel]) -> str:
    known = known_keys(root)
    same_name = [key for key in known if key.rsplit(".", 1)[-1] == location[-1]]
    close = difflib.get_close_matches(".".join(location), known, 1, 0.8)
    section = ".".join(location[:-1])
    siblings = [key.removeprefix(f"{section}.") for key in known if key.rpartition(".")[0] == section]
    if same_name or close:
        return f"Did you mean {(close or same_name)[0]}?"
    return f"Remove it, or use one of: {', '.join(siblings)}." if siblings else "Remove it."


def _description(location: list[str], root: type[BaseModel]) -> str:
    """The documentation of a field, so that an error says what the field is for."""
    sections: list[type[BaseModel]] = [root]
    description = ""
    for part in location:
        info = next((info for s in sections for name, info in s.model_fields.items() if part == (info.alias or name)), None)
        if info is None:  # a name chosen by the user, such as an objective
            continue
        description = " ".join((info.description or "").split())
        sections = _sections(info.annotation)
    return description if not sections else ""


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a configuration section and the sections inside it; user-chosen names appear as `<name>`."""
    keys: list[str] = []
    for field, info in model.model_fields.items():
        name = info.alias or field
        keys.append(prefix + name)
        inner = "<name>." if "dict" in str(info.annotation) else ""
        for section in _sections(info.annotation):
            keys += known_keys(section, f"{prefix}{name}.{inner}")
    return list(dict.fromkeys(keys))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in getattr(annotation, "__args__", ()) for section in _sections(argument)]


def result_fields(section: BaseModel) -> dict[str, Any]:
    """The part of a configuration that decides what comes out; pools, paths and the cluster are left out."""
    fields: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("affects_results") is False:
            continue
        value = getattr(section, name)
        if isinstance(extra, dict) and "no_result" in extra:
            value = {key: given for key, given in value.items() if key not in cast(list[str], extra["no_result"])}
        if isinstance(value, BaseModel):
            value = result_fields(value)
        elif isinstance(value, dict):
            value = {k: result_fields(v) if isinstance(v, BaseModel) else v for k, v in value.items()}
        fields[info.alias or name] = value
    return dict(json.loads(json.dumps(fields)))


def fingerprint(config: Config) -> str:
    """32 hex digits over everything in the configuration that affects results."""
    canonical = json.dumps(result_fields(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Human-readable differences between two `result_fields`, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}{key}.")
        ]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old!r} -> {new!r}"]


def to_yaml(config: Config) -> str:
    """The resolved configuration, every default filled in."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
