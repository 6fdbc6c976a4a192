"""What the benchmarks share: results with bars, spreads over rounds, and the machine they ran on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rc_ray.ledger.rundir import versions

ROOT = Path(__file__).parent.parent.parent
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_eval"
MIB = 1 << 20
Spec = dict[str, Any]


class Results:
    """What is printed, kept for the JSON file, and decides the exit status."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.numbers: dict[str, Any] = {"quick": quick}
        self.missed: list[str] = []

    def bar(self, met: bool, text: str) -> None:
        print(f"{'PASS' if met else 'FAIL'}  {text}", flush=True)
        self.numbers.setdefault("bars", {})[text] = met
        self.missed += [] if met else [text]

    def finish(self, name: str, output: Path) -> int:
        """Writes the numbers; the exit status."""
        (output / f"{name}.json").write_text(json.dumps(self.numbers, indent=1) + "\n")
        print(f"\nnumbers and figures: {output}")
        if self.missed:
            print(f"missed{' (small data, does not count)' if self.quick else ''}: {'; '.join(self.missed)}")
        return int(bool(self.missed) and not self.quick)


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):,.{digits}f} [{min(values):,.{digits}f}-{max(values):,.{digits}f}]"


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def machine(*packages: str) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory, 1)}
    return found | versions() | {name: metadata.version(name) for name in packages}


def options_of(doc: str | None, parser: argparse.ArgumentParser | None = None) -> tuple[argparse.Namespace, Path]:
    """The options that every benchmark has, and the folder for what it writes."""
    parser = parser or argparse.ArgumentParser()
    parser.description, parser.formatter_class = doc, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="small data; bars are printed but do not count")
    parser.add_argument("--output", type=Path, help="folder for numbers and figures; default: a new temporary one")
    options = parser.parse_args()
    output = options.output or Path(tempfile.mkdtemp(prefix="bench_"))
    output.mkdir(parents=True, exist_ok=True)
    if options.quick:
        print("--quick: small data; PASS and FAIL are printed, but only wrong results count")
    return options, output


def begin_rounds(
    doc: str | None, parser: argparse.ArgumentParser | None = None
) -> tuple[argparse.Namespace, Path, Results, int]:
    """Options, output, results that begin with the machine, and the number of rounds of a benchmark whose competitors take turns."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, help="how often competitors take turns; default: 3, with --quick 1")
    options, output = options_of(doc, parser)
    results = Results(options.quick)
    results.numbers["machine"] = machine()
    print(json.dumps(results.numbers["machine"]), flush=True)
    return options, output, results, options.rounds or (1 if options.quick else 3)


# Of a competitor that computes on all cores but one.
CORE_LEFT = {"RC_RAY_FREE_CORES": "1"}


def asker(script: str, environment: Mapping[str, str] | None = None) -> Callable[[str, Spec], Spec]:
    """What runs a competitor of this script, by its name, in a process of its own, with more in its environment; see `is_worker`."""

    def ask(name: str, spec: Spec) -> Spec:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "spec.json"
            path.write_text(json.dumps(spec))
            log = Path(folder) / "log"
            with log.open("w") as file:
                command = [sys.executable, script, "--worker", name, str(path)]
                done = subprocess.run(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=7200,
                    check=False,
                    env={**os.environ, **(environment or {})},
                )
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{log.read_text()[-4000:]}")
            return dict(json.loads((Path(folder) / "result.json").read_text()))

    return ask


def is_worker(competitors: Mapping[str, Callable[[Spec], Spec]]) -> bool:
    """Whether this process is one that `asker` started; then the competitor has run."""
    if sys.argv[1:2] != ["--worker"]:
        return False
    path = Path(sys.argv[3])
    (path.parent / "result.json").write_text(json.dumps(competitors[sys.argv[2]](json.loads(path.read_text()))))
    return True
