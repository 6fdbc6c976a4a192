"""The command line: help, exit codes, and messages that name the field before anything is started or written."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import rc_ray.doctor
import rc_ray.pipeline.rounds
from rc_ray.cli import main
from rc_ray.config import load_config
from rc_ray.doctor import Finding
from rc_ray.errors import ConfigError
from rc_ray.ledger import rundir
from rc_ray.pipeline import stages
from tests.conftest import ROOT

MAX_SECONDS = 10
STAGE_OPTIONS = ["CONFIG", "--set KEY=VALUE", "--input", "--output"]
OPTIONS = {
    "run": ["CONFIG", "--set KEY=VALUE", "resume"],
    "sample": STAGE_OPTIONS,
    "score": STAGE_OPTIONS,
    "select": STAGE_OPTIONS,
    "train": STAGE_OPTIONS,
    "evaluate": STAGE_OPTIONS,
    "report": ["run_directory"],
    "plan": ["CONFIG", "--set KEY=VALUE", "--cpus", "--gpus"],
    "doctor": ["--help"],
    "calibrate": ["CONFIG", "--set KEY=VALUE", "--pairs OBJECTIVE=FILE", "--precision", "--output"],
    "train-reward": ["--pairs", "--output", "--base", "--epochs", "--num-train", "--num-test", "--max-length", "--seed"],
}


@pytest.fixture(autouse=True)
def own_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command adds its folder to the search path of its process, which here is the tests'."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def config_file(tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    """A valid configuration in its own folder; its output is `run` beside it and does not exist."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ["a?", "b?", "", "c?", "a?"]))
    config = copy.deepcopy(tiny_config)
    config |= {"output": str(tmp_path / "run"), "prompts": {"path": str(tmp_path / "prompts.jsonl")}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "my.yaml"


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def create_run(config_file: Path) -> None:
    config = load_config(config_file)
    rundir.create(config, stages.check(config))


def check_message(message: str, words: list[str]) -> None:
    """One block on standard error, in our words."""
    assert message.startswith("rc-ray: ")
    assert "Traceback" not in message
    assert "\n\n" not in message
    for word in words:
        assert word in message


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of([], capsys)
    listed = text.partition("COMMAND\n")[2].partition("\n\n")[0]
    commands = {line.split()[0] for line in listed.splitlines() if line.startswith("    ") and line[4] != " "}
    assert commands == set(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_names_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of([command], capsys)
    assert f"usage: rc-ray {command}" in text
    for option in OPTIONS[command]:
        assert option in text


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "rc_ray", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: rc-ray ")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["run"], ["plan", "my.yaml", "--cpus", "many"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: rc-ray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("generation.num_candidate=8", 2, ["ConfigError", "generation.num_candidate = 8: unknown key", "Did you mean"]),
        ("generation.num_candidates=1", 2, ["ConfigError", "generation.num_candidates = 1", "a pair needs two"]),
        ("rewards={length: {kind: rule, function: 'a:b'}}", 2, ["ConfigError", "rewards has 1 objective", "add another"]),
        ("rewards.length.function=rc_ray.rewards.rules:lenght", 2, ["ConfigError", "rc_ray.rewards.rules:lenght", "function"]),
        ("rewards.length.args={words: 3}", 2, ["ConfigError", "target_words"]),
        ("prompts.path=/no/such/prompts.jsonl", 3, ["DataError", "prompts.path = '/no/such/prompts.jsonl'", "no such file"]),
        ("evaluation.prompts.path=/no/such.csv", 3, ["DataError", "evaluation.prompts.path = '/no/such.csv'"]),
        ("prompts.column=question", 3, ["DataError", "prompts.column = 'question'", "it has: prompt"]),
        ("generation.max_model_len=4096", 3, ["DataError", "generation.max_model_len = 4096", "at most 512 tokens"]),
        ("model=/no/such/model", 4, ["ModelError", "model = '/no/such/model'", "does not exist"]),
        ("rewards.helpful.model=embedded:nope", 4, ["ModelError", "rewards.helpful.model = 'embedded:nope'"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_configuration_ends_early_and_writes_nothing(
    command: str, override: str, code: int, words: list[str], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, started = contents(config_file.parent), time.monotonic()
    assert main([command, str(config_file), "--set", override]) == code
    assert time.monotonic() - started < MAX_SECONDS
    out, err = capsys.readouterr()
    assert out == ""
    check_message(err, words)
    assert contents(config_file.parent) == before


def run_in_a_process(arguments: list[str], folder: Path) -> tuple[int, str, float]:
    """Exit code, standard error and seconds; a slow first attempt is repeated, since shared machines pause."""
    for _ in range(2):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "rc_ray", *arguments], capture_output=True, text=True, cwd=folder, timeout=60, check=False
        )
        seconds = time.monotonic() - started
        if seconds < MAX_SECONDS:
            break
    return done.returncode, done.stderr, seconds


def test_a_missing_model_is_told_within_seconds(config_file: Path) -> None:
    before = contents(config_file.parent)
    code, err, seconds = run_in_a_process(["run", str(config_file), "--set", "model=./models/absent"], config_file.parent)
    assert code == 4
    check_message(err, ["model = './models/absent'", "does not exist"])
    assert seconds < MAX_SECONDS
    assert contents(config_file.parent) == before


def test_the_directory_of_another_configuration_is_told_within_seconds(config_file: Path) -> None:
    create_run(config_file)
    before = contents(config_file.parent)
    code, err, seconds = run_in_a_process(["run", str(config_file), "--set", "seed=5"], config_file.parent)
    assert code == 6
    check_message(err, ["ResumeError", "output = ", str(config_file.parent / "run"), "  seed: 0 -> 5"])
    assert seconds < MAX_SECONDS
    assert contents(config_file.parent) == before


def test_other_prompts_under_the_same_name_are_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_run(config_file)
    with (config_file.parent / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "one more?"}\n')
    assert main(["run", str(config_file)]) == 6
    check_message(capsys.readouterr().err, ["content of prompts:", "another `output`"])


@pytest.mark.parametrize("stage", ["sample", "score", "select", "train", "evaluate"])
def test_input_and_output_go_together(stage: str, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(config_file.parent)
    target = str(config_file.parent / "target")
    assert main([stage, str(config_file), "--output", target]) == 2
    check_message(capsys.readouterr().err, ["ConfigError", "--output = ", "no effect without --input"])
    assert main([stage, str(config_file), "--input", "somewhere"]) == 2
    check_message(capsys.readouterr().err, ["ConfigError", "--output is missing"])
    assert contents(config_file.parent) == before


def test_results_do_not_go_into_a_folder_with_something_else(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(config_file.parent)
    assert main(["score", str(config_file), "--input", "groups", "--output", folder]) == 3
    check_message(capsys.readouterr().err, [f"--output = {folder!r}", "not empty"])


@pytest.mark.parametrize("command", ["run", "select", "plan", "report"])
def test_a_folder_that_is_no_run_directory_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 3
    check_message(capsys.readouterr().err, [str(tmp_path), "is not a run directory"])
    assert contents(tmp_path) == {}


def test_a_missing_configuration_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "absent.yaml"]) == 2
    check_message(capsys.readouterr().err, ["'absent.yaml'", "does not exist"])


def test_preferences_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    output = ["--output", str(tmp_path / "reward")]
    assert main(["train-reward", "--pairs", "absent.jsonl", "--base", str(model), *output]) == 3
    check_message(capsys.readouterr().err, ["pairs = 'absent.jsonl'", "no such file"])
    assert main(["train-reward", "--pairs", "embedded:helpful", "--base", "/no/such/base", *output]) == 4
    check_message(capsys.readouterr().err, ["base = '/no/such/base'"])
    assert not (tmp_path / "reward").exists()


def test_plan_shows_what_a_run_would_do_and_writes_nothing(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(config_file.parent)
    assert main(["plan", str(config_file), "--cpus", "4", "--set", "generation.temperature=0.5"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "  temperature: 0.5\n" in out
    assert "  top_p: 1.0\n" in out
    for pool in ("generation", "helpful", "harmless", "length"):
        assert f"\n{pool:<10}  1 actor(s) x " in out
    assert "\nmode        streaming  (" in out
    assert "\nprompts      3 to sample, 2 bad or repeated rows\n" in out
    assert "\ncandidates   3 x 6 = 18, at most 288 tokens\n" in out
    assert "\nrough time   " in out
    assert "unknown" not in out.partition("rough time")[2].splitlines()[0]
    assert contents(config_file.parent) == before


def test_plan_for_gpus_and_for_a_cluster_that_is_too_small(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config_file), "--cpus", "32", "--gpus", "2"]) == 0
    assert "mode        phased" in capsys.readouterr().out
    assert main(["plan", str(config_file), "--cpus", "32", "--gpus", "2", "--set", "generation.pool.size=3"]) == 5
    check_message(capsys.readouterr().err, ["ClusterError", "cluster has 2", "add GPUs"])


def test_plan_reads_the_configuration_of_a_run_directory(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_run(config_file)
    assert main(["plan", str(config_file.parent / "run")]) == 0
    assert f"output: {config_file.parent / 'run'}" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("bad", 1)])
def test_doctor_fails_when_something_is_bad(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rc_ray.doctor, "diagnose", lambda: [Finding("ok", "this"), Finding(status, "that", "do so")])
    assert main(["doctor"]) == code
    assert capsys.readouterr().out.splitlines()[0] == "[ ok ] this"


def test_an_interrupt_says_how_to_go_on_and_a_bug_keeps_its_trace(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rc_ray.pipeline.rounds, "run_rounds", interrupted)
    assert main(["run", str(config_file)]) == 130
    assert "run the same command again to resume" in capsys.readouterr().err

    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(rc_ray.pipeline.rounds, "run_rounds", broken)
    with pytest.raises(AssertionError, match="ours"):
        main(["run", str(config_file)])


@pytest.mark.parametrize(
    "command", [[str(ROOT / "jobs" / "run_rcs.py"), "--config"], ["-m", "rc_ray", "run"]], ids=["job", "run"]
)
def test_nothing_is_written_into_rays_copy_of_what_was_submitted(command: list[str], config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    command = [sys.executable, *command, str(config_file), "--set", "output=runs/first"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == ConfigError.exit_code
    assert "output = 'runs/first': is in the folder that Ray keeps for this job alone" in found.stderr
    assert not list(folder.iterdir())
