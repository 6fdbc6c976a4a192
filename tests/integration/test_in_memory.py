"""Prompts of a notebook, in no file of the user's: a run with them resumes like any other, and repeats nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import rc_ray
from rc_ray.errors import ResumeError

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def test_a_run_of_prompts_in_memory_is_resumed_by_their_content(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_config) | {"output": str(tmp_path / "run"), "training": {"enabled": False}, "evaluation": {}}
    del config["prompts"]
    prompts = ["hello", MESSAGES, "hello", None, {"prompt": "no text"}, object(), "world"]
    first = rc_ray.run(config, prompts=prompts[:5] + prompts[6:])
    identity = first.metrics["identity"]
    assert identity["prompts"] == 6
    assert {name: identity["drops"].get(name) for name in ("duplicate_prompt", "invalid_prompt")} == {
        "duplicate_prompt": 1, "invalid_prompt": 2,
    }  # fmt: skip
    lines: list[str] = []
    again = rc_ray.run(config, prompts=iter(prompts[:5] + prompts[6:]), emit=lines.append)
    assert again.metrics == first.metrics
    assert any("0 tokens generated" in line for line in lines)
    with pytest.raises(ResumeError, match=r"(?s)prompts\.path: .*content of prompts"):
        rc_ray.run(config, prompts=[*prompts[:5], "another"])
    with pytest.raises(ResumeError, match="belongs to another configuration"):
        rc_ray.run(config, prompts=prompts)  # an object is no prompt, and no error
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        dataset = ray.data.from_items([{"prompt": "hello"}, {"prompt": "world"}, {"prompt": MESSAGES[1:]}])
        result = rc_ray.run(config | {"output": str(tmp_path / "dataset")}, prompts=dataset)
    finally:
        ray.shutdown()
    assert result.metrics["identity"]["prompts"] == 3
