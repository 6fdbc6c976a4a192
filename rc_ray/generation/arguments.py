"""vLLM's engine arguments, read from its source: importing vLLM takes ten seconds, and a wrong key should be found at once."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rc_ray.errors import ConfigError
from rc_ray.models.resolve import adapter_rank


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


# What vLLM takes as `max_lora_rank`.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check_engine_arguments(given: dict[str, Any], field: str = "generation.engine") -> None:
    """Checks the keys of a field that holds engine arguments.

    Raises:
        ConfigError: vLLM has no such argument, or it is a secret.
    """
    known = engine_arguments()
    for name, value in given.items():
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see `vllm serve --help` for the names"
            raise ConfigError(f"{field}.{name} = {value!r}: vLLM has no such engine argument; {hint}")
        if name == "hf_token" and value is not None:
            raise ConfigError(
                f"{field}.hf_token: a token would be kept with the run; set the environment variable HF_TOKEN on every node"
            )


def lora_arguments(adapters: Mapping[str, str], given: dict[str, Any], with_base: bool, on_gpu: bool) -> dict[str, Any]:
    """vLLM's arguments for LoRA adapters, by their `adapter_config.json`; those of the user are kept.

    Args:
        adapters: local folders by name.
        given: `generation.engine`.
        with_base: whether there are requests without an adapter, too.

    Raises:
        ConfigError: an argument of the user's is too small for the adapters. ModelError: one is no LoRA.
    """
    highest = max(adapter_rank(f"adapter of {name}", Path(path)) for name, path in adapters.items())
    rank = next((r for r in LORA_RANKS if r >= highest), None)
    if rank is None:
        raise ConfigError(
            f"adapters have ranks up to {highest}, and vLLM takes at most {LORA_RANKS[-1]}; merge them into the model"
        )
    # Its CPU backend gives a request without an adapter the one in the last slot, which is therefore left empty.
    spare = int(with_base and not on_gpu)
    needed = {"max_lora_rank": rank, "max_loras": len(adapters) + spare}
    for name, least in (("max_lora_rank", highest), ("max_loras", needed["max_loras"] if spare else 1)):
        if name in given and given[name] < least:
            raise ConfigError(
                f"generation.engine.{name} = {given[name]!r}: the adapters need at least {least}; raise or remove it"
            )
    return {"enable_lora": True, **{name: given.get(name, value) for name, value in needed.items()}}
