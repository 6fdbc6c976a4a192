"""vLLM's engine arguments, read from its source: importing vLLM takes ten seconds, and a wrong key should be found at once."""

from __future__ import annotations

import ast
import difflib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rc_ray.errors import ConfigError


@cache
def engine_arguments() -> frozenset[str]:
    """Names of the fields of the installed vLLM's `EngineArgs`; empty where vLLM is not installed, as on a login node."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    source = Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            return frozenset(s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name))
    return frozenset()


def check_engine_arguments(given: dict[str, Any]) -> None:
    """Checks the keys of `generation.engine`.

    Raises:
        ConfigError: vLLM has no such argument.
    """
    known = engine_arguments()
    for name, value in given.items():
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see `vllm serve --help` for the names"
            raise ConfigError(f"generation.engine.{name} = {value!r}: vLLM has no such engine argument; {hint}")
