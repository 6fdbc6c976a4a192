"""Several policies, LoRA adapters among them, on real engines: every candidate is what its policy gives alone for that seed."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rc_ray
from rc_ray.core.ids import candidate_seed
from rc_ray.ledger import rundir
from tests.conftest import CHAT_TEMPLATE, make_adapter, make_llama, sampling_counts

Rows = dict[str, dict[str, Any]]
# Fits the base's template to the token, and not the one of `other`.
LONG = "x" * 238


@pytest.fixture(scope="module")
def models(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("policies")
    make_adapter(tiny_policy, folder / "first", folder / "first-merged", seed=1)
    make_adapter(tiny_policy, folder / "second", folder / "second-merged", seed=2, rank=12)
    make_llama(folder / "other", seed=9)
    (folder / "other" / "chat_template.jinja").write_text("verbose! " + CHAT_TEMPLATE)
    names = ("first", "first-merged", "second", "second-merged", "other")
    return {"base": str(tiny_policy), **{name: str(folder / name) for name in names}}


@pytest.fixture(scope="module")
def ray_session() -> Any:
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def sampled(tiny_config: dict[str, Any], models: dict[str, str], ray_session: Any) -> Any:
    """Groups by prompt of a configuration's policy or policies."""

    def sample(model: str = "base", **generation: Any) -> Rows:
        config = copy.deepcopy(tiny_config) | {
            "prompts": {"path": "none", "column": "q"},
            "output": "none",
            "training": {"enabled": False},
        }
        config |= {"model": models[model], "evaluation": {}}
        config["generation"] |= generation
        prompts = ray_session.data.from_items([{"q": q} for q in (*(f"hello {i}?" for i in range(20)), LONG)])
        return {row["prompt"][0]["content"]: row for row in rc_ray.sample(config, prompts).take_all()}

    return sample


def answers(group: dict[str, Any]) -> list[tuple[str, list[int], int]]:
    return [(c["text"], c["token_ids"], c["seed"]) for c in group["candidates"]]


def test_an_adapter_samples_as_the_model_it_is_merged_into(sampled: Any, models: dict[str, str]) -> None:
    adapter, merged, base = sampled(adapter=models["first"]), sampled("first-merged"), sampled()
    assert len(adapter) == 21
    assert {c["policy"] for group in adapter.values() for c in group["candidates"]} == {"policy"}
    assert all(answers(group) == answers(merged[prompt]) for prompt, group in adapter.items())
    assert all(answers(group) != answers(base[prompt]) for prompt, group in adapter.items())


def test_every_candidate_of_a_mixture_is_what_its_policy_gives_alone(sampled: Any, models: dict[str, str]) -> None:
    alone = {
        "plain": sampled(),
        "first": sampled("first-merged"),
        "second": sampled("second-merged"),
        "other": sampled("other"),
    }
    policies = {
        "plain": {"weight": 1},
        "first": {"adapter": models["first"], "weight": 1},
        "second": {"adapter": models["second"], "weight": 2},
        "other": {"model": models["other"], "weight": 4},
    }
    mixed = sampled(num_candidates=6, policies=policies)
    counts: Counter[str] = Counter()
    for prompt, group in mixed.items():
        if prompt == LONG:
            continue
        assert len(group["candidates"]) == 6
        assert [c["seed"] for c in group["candidates"]] == [candidate_seed(0, group["prompt_id"]) + i for i in range(6)]
        own = Counter(c["policy"] for c in group["candidates"])
        assert all(abs(own[name] - 6 * policy["weight"] / 8) < 1 for name, policy in policies.items())
        for i, candidate in enumerate(group["candidates"]):
            assert answers(group)[i] == answers(alone[candidate["policy"]][prompt])[i]
        counts += own
    assert counts.keys() == policies.keys()
    # One policy without room for the prompt drops the group, whatever others have sampled.
    assert alone["plain"][LONG]["failure"] is None
    long = mixed[LONG]
    assert (long["failure"], long["candidates"]) == ("prompt_too_long", [])
    assert long["failure_detail"].startswith("policy other: 249 prompt tokens + max_tokens 16 > max_model_len 256")


def test_a_run_with_two_models_is_counted_resumed_and_forked(
    tiny_config: dict[str, Any], models: dict[str, str], mixed_prompts: Path, tmp_path: Path, ray_session: Any
) -> None:
    config = copy.deepcopy(tiny_config) | {"prompts": {"path": str(mixed_prompts)}, "output": str(tmp_path / "run")}
    config |= {"training": {"enabled": False}, "evaluation": {}}
    config["generation"] |= {"policies": {"large": {"model": models["other"], "weight": 3}, "small": {}}, "num_candidates": 4}
    lines: list[str] = []
    result = rc_ray.run(config, emit=lines.append)
    pools = [line for line in lines if line.startswith("pool")]
    assert any("generation large" in line for line in pools)
    assert any("generation small" in line for line in pools)
    assert any(line.startswith("sample") and "31/31 prompts  100 %" in line for line in lines)

    groups = pq.read_table(tmp_path / "run" / "candidates").to_pylist()
    given = {g["prompt_id"]: [c["policy"] for c in g["candidates"]] for g in groups}
    assert all(names == ["large"] * 3 + ["small"] for names in given.values() if names)
    pairs = pq.read_table(tmp_path / "run" / "pairs").to_pylist()
    assert pairs
    assert set(sampling_counts(result)) == {"groups", "candidates", "tokens", "truncated", "failed", "policies"}
    for name, counts in result.metrics["sampling"]["policies"].items():
        tokens = [len(c["token_ids"]) for g in groups for c in g["candidates"] if c["policy"] == name]
        assert (counts["candidates"], counts["tokens"]) == (len(tokens), sum(tokens))
        for side in ("chosen", "rejected"):
            assert counts[side] == sum(given[p["prompt_id"]][p[f"{side}_index"]] == name for p in pairs)
    sides = [sum(c[side] for c in result.metrics["sampling"]["policies"].values()) for side in ("chosen", "rejected")]
    assert sides == [len(pairs), len(pairs)]
    assert (
        f"75.0 % large: `{models['other']}`; 25.0 % small: `{models['base']}`" in (tmp_path / "run" / "README.md").read_text()
    )

    # A chunk whose commit was lost is sampled again, by both, with the same outcome.
    ledger = rundir.open_existing(str(tmp_path / "run")).ledger
    for stage in ("sample", "score", "select"):
        ledger.give_back(stage, 1)
    before = (tmp_path / "run" / "pairs" / "chunk-000001.parquet").read_bytes()
    again = rc_ray.run(config, emit=lines.append)
    assert sampling_counts(again) == sampling_counts(result)
    assert again.metrics["identity"] == result.metrics["identity"]
    assert (tmp_path / "run" / "pairs" / "chunk-000001.parquet").read_bytes() == before

    fork = config | {"output": str(tmp_path / "fork"), "selection": {"consistency": "weak", "allow_truncated_winner": True}}
    lines.clear()
    forked = rc_ray.run(fork, fork_from=str(tmp_path / "run"), emit=lines.append)
    assert "rc_ray    to do: select" in lines
    counts = [
        {n: (c["candidates"], c["tokens"]) for n, c in r.metrics["sampling"]["policies"].items()} for r in (forked, result)
    ]
    assert counts[0] == counts[1]
