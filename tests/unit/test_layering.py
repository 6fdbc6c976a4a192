"""The shape of the package: size of modules, what is light to import, and which layer may use which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rc_ray

PACKAGE = Path(rc_ray.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 600
HEAVY = {"ray", "torch", "vllm", "transformers"}
# Layers whose modules may import these inside functions only.
LIGHT = {"errors", "config", "core", "ledger", "models", "doctor", "api", "cli", "__init__", "__main__"}
# A module may import from layers with a lower rank, and from its own subpackage.
RANKS = {
    "errors": 0,
    "config": 1,
    "core": 2,
    "ledger": 3,
    "models": 4,
    "generation": 5,
    "rewards": 5,
    "training": 6,
    "evaluation": 6,
    "pipeline": 7,
    "doctor": 8,
    "demo": 0,
    "__init__": 9,
    "__main__": 9,
    "api": 9,
    "cli": 9,
}
# Choices that depend on the machine alone are the same for policies and reward models, and a judge is asked as a policy is.
EXCEPTIONS = {("rewards", f"rc_ray.generation.{module}") for module in ("hardware", "engine", "render")}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def layer_of(path: Path) -> str:
    first, *rest = path.relative_to(PACKAGE).parts
    return first if rest else path.stem


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path, inside_functions: bool) -> Iterator[str]:
    """Dotted names that a module imports when it runs; `from a import b` gives `a.b`."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            if not inside_functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)} line {child.lineno}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            else:
                yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def module_behind(dotted: str) -> str:
    """`rc_ray.generation.hardware` of `rc_ray.generation.hardware.choose_dtype`."""
    parts = dotted.split(".")
    while parts and not (
        (PACKAGE.parent.joinpath(*parts)).is_dir() or PACKAGE.parent.joinpath(*parts).with_suffix(".py").is_file()
    ):
        parts.pop()
    return ".".join(parts)


def violations() -> list[str]:
    found = []
    for path in MODULES:
        layer = layer_of(path)
        for dotted in imports(path, inside_functions=True):
            parts = dotted.split(".")
            if parts[0] != "rc_ray":
                continue
            module = module_behind(dotted)
            target = module.split(".")[1] if "." in module else "__init__"
            allowed = target == layer or RANKS[target] < RANKS[layer] or RANKS[target] == RANKS[layer] == RANKS["cli"]
            if not allowed and (layer, module) not in EXCEPTIONS:
                found.append(f"{name_of(path)} imports {dotted}")
    return found


def test_the_package_was_found_and_every_layer_has_a_rank() -> None:
    assert len(MODULES) > 20
    assert {layer_of(path) for path in MODULES} == set(RANKS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short_and_documented(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    assert (ast.get_docstring(ast.parse(source)) or "").strip()


def test_what_a_login_node_needs_imports_nothing_heavy() -> None:
    light = [path for path in MODULES if layer_of(path) in LIGHT]
    assert {layer_of(path) for path in light} == LIGHT
    found = [f"{name_of(p)} imports {d}" for p in light for d in imports(p, False) if d.split(".")[0] in HEAVY]
    assert found == []


def test_imports_between_layers_point_down() -> None:
    assert violations() == []


def test_the_exceptions_are_still_needed() -> None:
    used = {(layer_of(path), module_behind(d)) for path in MODULES for d in imports(path, True)}
    assert used >= EXCEPTIONS
