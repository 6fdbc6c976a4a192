"""A run with a reward that is a class in the user's own file, which Ray's workers cannot reach."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rc_ray

CODE = """
import os

class Brief:
    def __init__(self, target_words, device):
        assert device == "cpu"
        assert not os.path.exists("mine/brief.py"), "made where the file is"
        self.target_words = target_words
        self.counts = {"num_texts": 0, "num_truncated": 0}

    def figures(self):
        return self.counts

    def score(self, prompts, answers):
        if any("number 3?" in prompt[-1]["content"] for prompt in prompts):
            raise ValueError("a prompt that is too odd")
        self.counts["num_texts"] += len(answers)
        self.counts["num_truncated"] += sum(len(prompt) == 1 for prompt in prompts) // 6  # one for each prompt
        return [-abs(len(answer.split()) - self.target_words) for answer in answers]
"""


@pytest.fixture
def workers_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the driver, which is not that of Ray's workers."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    ray.shutdown()


def test_the_file_reaches_the_workers_and_belongs_to_the_run(tiny_config: dict[str, Any], workers_elsewhere: Path) -> None:
    folder = workers_elsewhere
    (folder / "mine").mkdir()
    (folder / "mine" / "brief.py").write_text(CODE)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"hello number {i}?"}) + "\n" for i in range(8)))
    config = copy.deepcopy(tiny_config) | {"output": "run", "training": {"enabled": False}, "evaluation": {}}
    config["prompts"] = {"path": "prompts.jsonl"}
    config["cluster"] = {"chunk_size": 4, "progress_interval_s": 1}
    config["rewards"] = {
        "brief": {"kind": "custom", "class": "mine/brief.py:Brief", "args": {"target_words": 2}},
        "length": tiny_config["rewards"]["length"],
    }
    lines: list[str] = []
    result = rc_ray.run(config, emit=lines.append)
    cut = "brief: 7 of 42 texts were truncated before they were scored"
    assert f"score     {cut}" in lines
    assert f"rewards        {cut}" in lines
    assert result.metrics["scoring"]["brief"]["num_truncated"] == 7
    assert result.metrics["identity"]["drops"]["reward_missing"] == 1
    drops = [row for file in (folder / "run" / "drops").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    (detail,) = [row["detail"] for row in drops if row["reason"] == "reward_missing"]
    assert "scoring failed: ValueError: a prompt that is too odd" in detail
    groups = [g for file in (folder / "run" / "candidates").glob("*.parquet") for g in pq.read_table(file).to_pylist()]
    scored = [g for g in groups if g["missing.brief"] is None]
    assert len(scored) == 7
    for group in scored:
        assert group["reward.brief"] == [-abs(len(c["text"].split()) - 2) for c in group["candidates"]]
    # Another content: refused for this run; in a fork, this objective alone is scored again.
    (folder / "mine" / "brief.py").write_text(CODE.replace("return [-abs", "return [abs"))
    with pytest.raises(rc_ray.ResumeError, match=r"content of rewards\.brief\.class: \w+ -> \w+"):
        rc_ray.run(config, emit=lambda _: None)
    lines.clear()
    rc_ray.run({**config, "output": "fork"}, fork_from="run", emit=lines.append)
    assert any("rewards kept: length" in line for line in lines)
    groups = [g for file in (folder / "fork" / "candidates").glob("*.parquet") for g in pq.read_table(file).to_pylist()]
    for group in (g for g in groups if g["missing.brief"] is None):
        assert group["reward.brief"] == [abs(len(c["text"].split()) - 2) for c in group["candidates"]]
