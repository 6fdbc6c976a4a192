"""Judges for real: a vLLM server, the same model in an engine of ours, and a whole run; a tiny random model, so only form and numbers count."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rc_ray
from rc_ray.config import JudgeReward
from rc_ray.core.ids import Message
from rc_ray.generation.hardware import cpu_engine_environment
from rc_ray.ledger import rundir
from rc_ray.rewards.base import Score
from rc_ray.rewards.chat import EndpointChat, Reply, Wanted
from rc_ray.rewards.judge import JudgeRewardModel
from tests.conftest import ROOT, make_llama

MAX_LENGTH = 2048
START_S = 180.0  # three times what it takes on two idle cores is little where others work, too
CRITERION = {"kind": "judge", "criterion": "It is brief."}
METHODS = ("score", "yes", "pairwise")
FIRST: list[Message] = [{"role": "user", "content": "How are you today?"}]
SECOND: list[Message] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello world?"}]
LONG = "much too long " * 400
ANSWERS = ["Fine.", "Well, thank you.", "", "I am.", LONG]
# A group of four and one of three, whose last answer does not fit.
CASES = [(FIRST, answer) for answer in ANSWERS[:4]] + [(SECOND, answer) for answer in ANSWERS[2:]]


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random chat model that says yes or no: of two random directions in which these words lie on either side, one is always likely."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_llama(tmp_path_factory.mktemp("judge") / "model", seed=5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = [("yes", "no"), ("Yes", "No"), ("YES", "NO"), (" yes", " no")]
    tokenizer.add_tokens([word for pair in words for word in pair])
    model.resize_token_embeddings(len(tokenizer))
    generator = torch.Generator().manual_seed(7)
    directions = [4 * torch.randn(model.config.hidden_size, generator=generator) for _ in range(2)]
    for number, pair in enumerate(words):
        for word in pair:
            noise = 0.1 * torch.randn(model.config.hidden_size, generator=generator)
            row = (-1) ** number * directions[number // 2] + noise
            model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(word)] = row
    model.config.max_position_embeddings = MAX_LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(judge_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of vLLM's server with the model."""
    import requests

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--served-model-name": "judge-1",
        "--dtype": "float32",
        "--max-model-len": str(MAX_LENGTH),
        "--max-num-batched-tokens": "4096",
        "--max-num-seqs": "8",
        # Left to itself a random model may write white space for ever.
        "--structured-outputs-config": json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
    }
    arguments = [part for pair in options.items() for part in pair] + ["--enforce-eager", "--no-enable-chunked-prefill"]
    # What `vllm serve` starts; that command itself looks for a package `vllm`, and the CPU build has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(judge_model), *arguments]
    environment = {**os.environ, **cpu_engine_environment(1)[0]}
    with log.open("wb") as output:
        # A session of its own, so that the engine's process ends with it.
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        started_s, is_ready = time.monotonic(), False
        while not is_ready:
            if process.poll() is not None or time.monotonic() - started_s > START_S:
                pytest.fail(f"vLLM's server did not start in {START_S:g} s:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
            with contextlib.suppress(requests.RequestException):
                is_ready = requests.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def from_server(url: str, method: str) -> list[Score]:
    config = JudgeReward(**CRITERION, url=url, model="judge-1", method=method, max_retries=0)
    return JudgeRewardModel(config, EndpointChat(config)).score([p for p, _ in CASES], [a for _, a in CASES])


@pytest.fixture(scope="module")
def by_server(server: str) -> dict[str, list[Score]]:
    return {method: from_server(server, method) for method in METHODS}


IN_ENGINE = """
import json, sys
from rc_ray.config import JudgeReward, RuleReward
from rc_ray.rewards.base import build_reward
from rc_ray.rewards.judge import JudgeRewardModel
given = json.load(open(sys.argv[1]))
configs = {method: JudgeReward(**options) for method, options in given["judges"].items()}
chat = build_reward(configs["score"], on_gpu=False, num_threads=2)._chat
prompts, answers = [], []
for prompt, answer in given["cases"]:
    prompts.append(prompts[-1] if prompts and prompts[-1] == prompt else prompt)
    answers.append(answer)
judges = {method: JudgeRewardModel(config, chat) for method, config in configs.items()}
found = {method: [(s.value, s.missing) for s in judge.score(prompts, answers)] for method, judge in judges.items()}
again = {method: [(s.value, s.missing) for s in judge.score(prompts[:4], answers[:4])] for method, judge in judges.items()}
print(json.dumps([found, again, judges["pairwise"].figures()]), flush=True)

# An engine that dies takes its process along, so that Ray starts another.
def broken():
    raise RuntimeError("broken")
chat._llm.llm_engine.step = broken
from rc_ray.pipeline.actors import ScoreGroups
from tests.unit.test_pairwise import groups_of
rule = RuleReward(kind="rule", function="rc_ray.rewards.rules:length_near", args={"target_words": 3})
scorer = ScoreGroups("length", rule, None, True, 1, None, "score", 3, True, True, False)
scorer._reward = judges["score"]
scorer(groups_of(("question", ("a", "b"))))
print("it went on")
"""


@pytest.fixture(scope="module")
def by_engine(judge_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, subprocess.CompletedProcess[str]]:
    """What the same model in an engine of ours says."""
    path = tmp_path_factory.mktemp("engine") / "given.json"
    judge = {**CRITERION, "model": str(judge_model), "max_length": MAX_LENGTH}
    path.write_text(json.dumps({"judges": {method: {**judge, "method": method} for method in METHODS}, "cases": CASES}))
    command = [sys.executable, "-c", IN_ENGINE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    assert results, done.stderr[-3000:]
    return json.loads(results[0]), done


class Asked:
    """Keeps the questions and answers none."""

    def __init__(self) -> None:
        self.questions: list[list[Message]] = []

    def ask(self, questions: list[list[Message]], wanted: Wanted) -> list[Reply]:
        self.questions += questions
        return [Reply(error="not asked")] * len(questions)


def log_odds(model: Path, cases: list[tuple[list[Message], str]]) -> list[float]:
    """Of yes and no among the 20 likeliest tokens, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = Asked()
    JudgeRewardModel(JudgeReward(**CRITERION, model=str(model), method="yes"), asked).score(*zip(*cases, strict=True))
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for question in asked.questions:
        ids: Any = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            top = network(torch.tensor([ids])).logits[0, -1].topk(20)
        words = [tokenizer.decode([token]).strip().lower() for token in top.indices.tolist()]
        yes, no = (
            top.values[[i for i, each in enumerate(words) if each == word]].logsumexp(0).item() for word in ("yes", "no")
        )
        found.append(yes - no)
    return found


def test_scores_of_a_server_are_on_the_scale(by_server: dict[str, list[Score]]) -> None:
    scores = by_server["score"]
    assert all(score.value in range(1, 11) for score in scores[:-1]), scores
    assert "status 400" in scores[-1].missing


def test_log_odds_of_a_server_are_those_of_the_plain_model(by_server: dict[str, list[Score]], judge_model: Path) -> None:
    scores = by_server["yes"]
    expected = log_odds(judge_model, CASES[:-1])
    assert [score.value for score in scores[:-1]] == pytest.approx(expected, abs=1e-3)
    assert len({round(value, 3) for value in expected}) > 3
    assert "status 400" in scores[-1].missing


def test_points_of_a_server_add_up_in_every_group(by_server: dict[str, list[Score]]) -> None:
    values = [score.value for score in by_server["pairwise"]]
    assert None not in values[:-1], by_server["pairwise"]
    assert sum(values[:4]) == pytest.approx(2.0)  # type: ignore[arg-type]
    assert sum(values[4:6]) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert "status 400" in by_server["pairwise"][-1].missing


def test_an_engine_of_ours_says_what_the_server_says(by_engine: tuple[Any, Any], by_server: dict[str, list[Score]]) -> None:
    found, again, figures = by_engine[0]
    for method in METHODS:
        values = [value for value, _ in found[method]]
        assert values == pytest.approx([score.value for score in by_server[method]], abs=1e-3), method
        assert values[:4] == pytest.approx([value for value, _ in again[method]], abs=1e-3), method
    for method, max_tokens in (("score", 64), ("yes", 1), ("pairwise", 64)):
        missing = found[method][-1][1]
        assert f"and {max_tokens} of a reply exceed the judge's max_length of {MAX_LENGTH}" in missing
    assert figures["num_comparisons"] == 6 + 1 + 6
    assert 0 <= figures["num_order_disagreements"] <= 13


def test_an_engine_that_dies_takes_its_process_along(by_engine: tuple[Any, subprocess.CompletedProcess[str]]) -> None:
    done = by_engine[1]
    assert done.returncode == 1
    assert "the vLLM engine died: RuntimeError: broken" in done.stderr
    assert "it went on" not in done.stdout


def test_a_run_loads_its_judge_and_pins_it(tiny_config: dict[str, Any], judge_model: Path, tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_config) | {"output": str(tmp_path / "run"), "training": {"enabled": False}, "evaluation": {}}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"hello number {i}?"}) + "\n" for i in range(6)))
    config["prompts"] = {"path": str(tmp_path / "prompts.jsonl")}
    judge = {**CRITERION, "model": str(judge_model), "method": "pairwise", "max_length": MAX_LENGTH}
    config["rewards"] = {"nice": judge, "length": tiny_config["rewards"]["length"]}
    config["generation"]["num_candidates"] = 4
    config["cluster"] = {"chunk_size": 3, "progress_interval_s": 1}
    rc_ray.run(config, emit=lambda _: None)
    run = rundir.open_existing(str(tmp_path / "run"))
    assert str(judge_model) in run.manifest()["models"]
    groups = pq.read_table(tmp_path / "run" / "candidates").to_pylist()
    assert len(groups) == 6
    for group in groups:
        assert group["missing.nice"] is None
        assert sum(group["reward.nice"]) == pytest.approx(2.0)
