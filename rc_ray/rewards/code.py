"""Code of the user's own behind a reward: a function or a class in a module, or a class in a file of its own.

The driver reads the file that it is in and sends the content to the reward's actors. A file that is named by its path is run from that
content, so no other node needs it. A module is imported on each node, and must have the same content there. What either imports must be
importable on every node, and is not compared.

Invariant: rewards come from the content whose hash the run has recorded. Modules of this package count as part of it and have no hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rc_ray.config import CustomReward, RewardConfig, RuleReward
from rc_ray.errors import ConfigError


def named_code(objective: str, reward: RewardConfig) -> tuple[str, str] | None:
    """The field of the configuration that names code, and what it names; None for other kinds."""
    if isinstance(reward, RuleReward):
        return f"rewards.{objective}.function", reward.function
    if isinstance(reward, CustomReward):
        return f"rewards.{objective}.class", reward.class_path
    return None


def read_code(field: str, path: str) -> bytes | None:
    """Content of the file that holds `module:name` or `path/to/file.py:name`; None where there is nothing to compare.

    Raises:
        ConfigError: there is no such file or module.
    """
    where, _ = _split(path)
    if _is_file(where):
        try:
            return Path(where).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{field} = {path!r}: {str(Path(where).expanduser().absolute())!r}: {error.strerror}; a relative path begins in the folder that "
                "the command is called from"
            ) from None
    if where.partition(".")[0] == "rc_ray":
        return None
    with _explained(field, path):
        file = getattr(importlib.import_module(where), "__file__", None)
    return Path(file).read_bytes() if file and Path(file).is_file() else None


def load_code(field: str, path: str, content: bytes | None = None) -> Any:
    """The function or class behind `module:name` or `path/to/file.py:name`.

    Args:
        content: of its file, as the driver sent it; None takes what is here.

    Raises:
        ConfigError: there is none, importing it raises, or a module has another content here.
    """
    where, name = _split(path)
    if _is_file(where):
        content = read_code(field, path) if content is None else content
        assert content is not None
        with _explained(field, path):
            module = _run(where, content)
    else:
        with _explained(field, path):
            module = importlib.import_module(where)
        if content is not None and read_code(field, path) != content:
            raise ConfigError(
                f"{field} = {path!r}: {module.__file__} on node {os.uname().nodename} is not what the driver read; put the same file on every "
                "node, and leave it as it is while a run goes on"
            )
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f"{field} = {path!r}: module {where!r} has no {name!r}; check the name") from None


def _split(path: str) -> tuple[str, str]:
    where, _, name = path.rpartition(":")
    return where, name


def _is_file(where: str) -> bool:
    return where.endswith(".py")


def _run(where: str, content: bytes) -> ModuleType:
    """A file as a module, from its content."""
    module = ModuleType(f"{Path(where).stem}_{hashlib.blake2b(content, digest_size=8).hexdigest()}")
    module.__file__ = where
    sys.modules[module.__name__] = module  # where dataclasses, among others, look for the names that a class was defined beside
    exec(compile(content, where, "exec", dont_inherit=True), module.__dict__)
    return module


@contextlib.contextmanager
def _explained(field: str, path: str) -> Iterator[None]:
    """Makes an error of the configuration of whatever importing the user's code raises."""
    where, _ = _split(path)
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{field} = {path!r}: {error}; the module must be importable on every node") from None
    except Exception as error:
        raise ConfigError(f"{field} = {path!r}: importing {where!r} raised {type(error).__name__}: {error}") from None
