"""The main job from end to end with real Ray, real vLLM, real reward models and real DPO on two workers, on tiny models."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import rc_ray
from rc_ray.core.ids import candidate_seed
from rc_ray.rewards.encoding import encode
from tests.conftest import FinishedRun


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_every_prompt_is_paired_or_dropped_once_with_its_reason(finished_run: FinishedRun) -> None:
    pairs, drops = rows(finished_run.folder / "pairs"), rows(finished_run.folder / "drops")
    ids = [r["prompt_id"] for r in pairs + drops]
    identity = finished_run.result.metrics["identity"]
    assert identity["prompts"] == 38 == len(pairs) + len(drops) == identity["paired"] + identity["dropped"]
    reasons = {
        reason: identity["drops"].get(reason, 0)
        for reason in ("empty_prompt", "duplicate_prompt", "invalid_prompt", "prompt_too_long")
    }
    assert reasons == {"empty_prompt": 2, "duplicate_prompt": 1, "invalid_prompt": 4, "prompt_too_long": 1}
    # A repeated prompt has the id of its first occurrence; all other ids occur once.
    assert len(ids) - len(set(ids)) == 1
    assert len(pairs) >= 5
    assert all(drop["detail"] for drop in drops)


def test_the_odd_prompt_was_sampled(finished_run: FinishedRun) -> None:
    odd = [g for g in rows(finished_run.folder / "candidates") if "مرحبا" in g["prompt"][-1]["content"]]
    assert len(odd) == 1
    assert odd[0]["failure"] is None
    assert len(odd[0]["candidates"]) == 6


def test_candidates_are_whole_and_carry_the_seeds_of_their_prompt(finished_run: FinishedRun) -> None:
    groups = [g for g in rows(finished_run.folder / "candidates") if g["failure"] is None]
    assert len(groups) == 30
    for group in groups:
        seed = candidate_seed(0, group["prompt_id"])
        assert [c["seed"] for c in group["candidates"]] == [seed + i for i in range(6)]
        for c in group["candidates"]:
            assert c["finish_reason"] in ("stop", "length")
            assert 1 <= len(c["token_ids"]) <= 16
            assert (len(c["token_ids"]) == 16) or c["finish_reason"] == "stop"
            assert c["logprob"] < 0


def test_log_probabilities_are_those_of_the_policy(finished_run: FinishedRun) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished_run.config["model"])
    network = AutoModelForCausalLM.from_pretrained(finished_run.config["model"], dtype=torch.float32).eval()
    groups = [g for g in rows(finished_run.folder / "candidates") if g["failure"] is None][:5]
    for group in groups:
        before = tokenizer.apply_chat_template(group["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
        for c in group["candidates"]:
            ids = torch.tensor([before + c["token_ids"]])
            with torch.inference_mode():
                each = network(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            assert c["logprob"] == pytest.approx(each[len(before) - 1 :].sum().item(), abs=1e-3)


def test_every_pair_is_strictly_consistent_by_the_stored_rewards_and_has_the_largest_gap(finished_run: FinishedRun) -> None:
    objectives = ["helpful", "harmless", "length"]
    scale = json.loads((finished_run.folder / "manifest.json").read_text())["selection"]["scale"]
    groups = {g["prompt_id"]: g for g in rows(finished_run.folder / "candidates")}
    pairs = {p["prompt_id"]: p for p in rows(finished_run.folder / "pairs")}
    for identity, group in groups.items():
        if group["failure"] is not None:
            assert identity not in pairs
            continue
        rewards = np.asarray([group[f"reward.{o}"] for o in objectives], dtype=np.float64)
        texts = [c["text"] for c in group["candidates"]]
        gaps = [
            (sum((rewards[k, w] - rewards[k, loser]) / scale[o] for k, o in enumerate(objectives)), -w, -loser)
            for w in range(6)
            for loser in range(6)
            if all(rewards[k, w] > rewards[k, loser] for k in range(3)) and texts[w] != texts[loser]
        ]
        assert (identity in pairs) == bool(gaps)
        if gaps:
            pair = pairs[identity]
            w, loser = pair["chosen_index"], pair["rejected_index"]
            assert (-w, -loser) == max(gaps)[1:]
            assert pair["gap"] == pytest.approx(max(gaps)[0])
            assert pair["chosen"] == [{"role": "assistant", "content": texts[w]}]
            assert pair["rejected"] == [{"role": "assistant", "content": texts[loser]}]
            assert pair["rewards_chosen"] == {o: rewards[k, w] for k, o in enumerate(objectives)}


def test_scale_in_the_manifest_is_the_standard_deviation_over_all_candidates(finished_run: FinishedRun) -> None:
    manifest = json.loads((finished_run.folder / "manifest.json").read_text())
    groups = rows(finished_run.folder / "candidates")
    for name, scale in manifest["selection"]["scale"].items():
        values = [r for g in groups for r in g[f"reward.{name}"]]
        assert scale == pytest.approx(float(np.std(np.asarray(values, dtype=np.float64))))


def test_the_trained_policy_loads_and_differs_from_its_base(finished_run: FinishedRun, tiny_policy: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(finished_run.folder / "model", dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).state_dict()
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    assert all(torch.isfinite(value).all() for value in trained.values())
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (finished_run.folder / "model", tiny_policy)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_training_took_every_pair(finished_run: FinishedRun) -> None:
    training = finished_run.result.metrics["training"]
    assert training["num_pairs"] == finished_run.result.metrics["identity"]["paired"]
    assert training["steps"] == -(-training["num_pairs"] // 4)
    losses = [entry["loss"] for entry in training["log_history"] if "loss" in entry]
    assert len(losses) == training["steps"]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3)  # policy and reference are equal before the first step


def test_evaluation_compares_all_held_out_prompts(finished_run: FinishedRun) -> None:
    evaluation = finished_run.result.metrics["evaluation"]
    assert evaluation["num_prompts"] == 6
    assert set(evaluation["objectives"]) == {"helpful", "harmless", "length"}
    for side in ("before", "after"):
        groups = rows(finished_run.folder / "report" / side)
        for name, values in evaluation["objectives"].items():
            mean = np.mean([np.mean(np.asarray(g[f"reward.{name}"], dtype=np.float64)) for g in groups])
            assert values[side]["mean"] == pytest.approx(mean)
            assert values[side]["low"] <= values[side]["mean"] <= values[side]["high"]


def test_progress_shows_every_stage(finished_run: FinishedRun) -> None:
    text = "\n".join(finished_run.lines)
    for stage in ("sample", "score", "select", "train", "sample_before", "score_after"):
        assert any(line.startswith(stage) and "100 %" in line for line in finished_run.lines), stage
    assert "tok/s" in text
    assert "38 prompts = " in text


def test_what_reward_actors_did_is_counted_and_shown(finished_run: FinishedRun, tiny_rewards: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    scoring = finished_run.result.metrics["scoring"]
    assert set(scoring) == {"helpful", "harmless", "length"}
    groups = [g for g in rows(finished_run.folder / "candidates") if g["failure"] is None]
    for name, folder in tiny_rewards.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [(g["prompt"], c["text"]) for g in groups for c in g["candidates"]]
        tokens = sum(len(encode(tokenizer, prompt, answer)["input_ids"]) for prompt, answer in texts)
        found = scoring[name]
        assert (found["num_texts"], found["num_tokens"], found["num_actors"]) == (30 * 6, tokens, 1)
        assert 0 <= found["padding_share"] == round(1 - tokens / found["num_padded_tokens"], 4) < 0.5
        assert found["tokens_per_s"] > 0
        assert 0 < found["busy_share"] <= 1
        for stage in ("score", "score_after"):
            line = next(line for line in finished_run.lines if line.startswith(f"{stage:<9} {name}: "))
            assert all(words in line for words in ("tok/s while scoring", "% padding", "1 actor(s)", "% busy"))
    assert set(scoring["length"]) == {"num_actors", "busy_share"}
    assert sum(line.startswith("rewards        ") for line in finished_run.lines) == 3
    html = (finished_run.folder / "report" / "index.html").read_text()
    assert f"<td>{scoring['helpful']['tokens_per_s']}</td>" in html


def test_report_card_and_manifest_are_there(finished_run: FinishedRun) -> None:
    html = (finished_run.folder / "report" / "index.html").read_text()
    assert html.count("<svg") == 2
    assert "http-equiv" not in html
    assert "src=" not in html
    card = (finished_run.folder / "README.md").read_text()
    assert f"38 prompts = {finished_run.result.metrics['identity']['paired']} paired" in card
    manifest = json.loads((finished_run.folder / "manifest.json").read_text())
    assert {"ray", "transformers", "trl", "torch"} <= manifest["versions"].keys()
    assert len(manifest["models"]) == 3


def test_pairs_go_into_trl_as_they_are(finished_run: FinishedRun, tiny_policy: Path, tmp_path: Path) -> None:
    import datasets
    from trl import DPOConfig, DPOTrainer

    dataset = datasets.load_dataset(
        "parquet", data_files=f"{finished_run.folder}/pairs/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(dataset) == finished_run.result.metrics["identity"]["paired"]
    options = DPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none"
    )
    trainer = DPOTrainer(model=str(tiny_policy), args=options, train_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_finished_run_run_again_does_nothing_and_says_so(finished_run: FinishedRun) -> None:
    before = digest(finished_run.folder)
    lines: list[str] = []
    started = time.monotonic()
    result = rc_ray.run(finished_run.config, emit=lines.append)
    assert time.monotonic() - started < 60
    assert any("0 tokens generated, 0 steps trained" in line for line in lines)
    assert result.metrics == finished_run.result.metrics
    assert digest(finished_run.folder) == before


def test_another_configuration_is_refused_and_nothing_changes(finished_run: FinishedRun) -> None:
    before = digest(finished_run.folder)
    with pytest.raises(rc_ray.ResumeError, match=r"generation\.num_candidates: 6 -> 4"):
        rc_ray.run(finished_run.config, ["generation.num_candidates=4"])
    assert digest(finished_run.folder) == before


def test_a_lost_file_is_an_error(finished_run: FinishedRun, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "run"
    shutil.copytree(finished_run.folder, other)
    next((other / "pairs").glob("*.parquet")).unlink()
    with pytest.raises(rc_ray.ResumeError, match="38 prompts are not"):
        rc_ray.run({**finished_run.config, "output": str(other)}, emit=lambda _: None)


def test_three_reward_pools_on_a_cluster_with_room_for_one_run_one_after_the_other(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    config = copy.deepcopy(finished_run.config) | {
        "output": str(tmp_path / "run"),
        "training": {"enabled": False},
        "evaluation": {},
    }
    config["cluster"] |= {"address": "local", "num_cpus": 1}
    for section in (config["generation"], *config["rewards"].values()):
        section["pool"] = {"num_cpus": 0.6}
    lines: list[str] = []
    rc_ray.run(config, emit=lines.append)
    assert any("phased" in line and "then one reward after the other" in line for line in lines)
    whole, phased = (pq.read_table(f / "candidates").sort_by("prompt_id") for f in (finished_run.folder, tmp_path / "run"))
    assert phased.select(["prompt_id", "failure"]).equals(whole.select(["prompt_id", "failure"]))
    for name in config["rewards"]:
        values = [[v for row in t.column(f"reward.{name}").to_pylist() for v in row] for t in (phased, whole)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
