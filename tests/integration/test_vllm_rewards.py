"""Classifiers in vLLM, on CPU: against plain transformers row by row, with shared prompts, too long texts, and what it refuses."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import rc_ray
from rc_ray.core import schemas
from tests.conftest import CHAT_TEMPLATE, make_llama, make_tokenizer

# In a process that has used Numba, as Ray's workers have.
ASK = """
import gc, json, sys
import numpy as np
from rc_ray.core.rule import consistency_matrix
assert consistency_matrix(np.eye(2, dtype=np.float32)).sum() == 0
from rc_ray.config import ClassifierReward
from rc_ray.errors import ModelError
from rc_ray.rewards.base import build_reward
found = {}
for name, job in json.loads(sys.stdin.read()).items():
    config = ClassifierReward(kind="classifier", engine="vllm", dtype="float32", **job["config"])
    try:
        reward = build_reward(config, on_gpu=False, num_threads=1)
    except ModelError as error:
        found[name] = {"error": str(error)}
        continue
    assert set(reward.figures().values()) == {0}
    prompts = [[{"role": "user", "content": prompt}] for prompt, _ in job["rows"]]
    scores = reward.score(prompts, [answer for _, answer in job["rows"]])
    found[name] = {"scores": [[s.value, s.missing] for s in scores], "figures": reward.figures()}
    del reward  # the end of an engine takes vLLM's process groups with it, also those of a next one
    gc.collect()
print(json.dumps(found), flush=True)
"""
Rows = list[tuple[str, str]]


def ask(jobs: dict[str, tuple[dict[str, Any], Rows]]) -> dict[str, Any]:
    """What rewards of these configurations say, or the error, by name."""
    given = json.dumps({name: {"config": config, "rows": rows} for name, (config, rows) in jobs.items()})
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def pair_tokenizer() -> Any:
    """One that joins a pair as BERT does, with token types."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=special
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, model_input_names=inputs, **names)


def network(kind: str, folder: Path, labels: int = 1) -> Path:
    """A tiny random classifier."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, Qwen2Config, Qwen2ForSequenceClassification

    if kind == "llama":
        return make_llama(folder, seed=3, labels=labels)
    torch.manual_seed(3)
    tokenizer = make_tokenizer() if kind == "qwen2" else pair_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "num_labels": labels,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "qwen2":
        Qwen2ForSequenceClassification(Qwen2Config(num_key_value_heads=1, **common)).save_pretrained(folder)
    else:
        BertForSequenceClassification(BertConfig(**common)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain(folder: Path, rows: Rows, kind: str) -> tuple[list[list[float]], list[int]]:
    """Logits by plain transformers, one row at a time, and lengths in tokens."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    logits, lengths = [], []
    for prompt, answer in rows:
        if kind == "bert":
            inputs = tokenizer(prompt, answer, return_tensors="pt")
            assert 1 in inputs["token_type_ids"]
        else:
            text = f"<|user|>{prompt}<|assistant|>{answer}</s>"
            inputs = {"input_ids": tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]}
        lengths.append(inputs["input_ids"].shape[1])
        with torch.inference_mode():
            logits.append(model(**inputs).logits[0].tolist() if lengths[-1] <= 512 else [])
    return logits, lengths


def texts(number: int, seed: int, shortest: int, longest: int) -> list[str]:
    draw, words = random.Random(seed), ["a", "b", "hello", "d", "yes", "world", "user"]
    return [" ".join(draw.choices(words, k=draw.randint(shortest, longest))) for _ in range(number)]


@dataclass(frozen=True)
class Asked:
    """Rows, what vLLM said of them, and the folders of the networks."""

    rows: Rows
    few: Rows
    folders: dict[str, Path]
    found: dict[str, Any]


LABEL = {"label": 1, "engine_arguments": {"block_size": 64, "max_num_seqs": 2}}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """All networks in one process, since starting vLLM is what takes long."""
    root = tmp_path_factory.mktemp("classifiers")
    rows = [(prompt, answer) for prompt in texts(4, 0, 40, 90) for answer in texts(6, len(prompt), 1, 60)]
    rows.append((rows[0][0], "yes " * 600))
    random.Random(1).shuffle(rows)
    few = [*zip(texts(6, 0, 20, 40), texts(6, 1, 1, 60), strict=True), (texts(1, 2, 20, 40)[0], "yes " * 400)]
    folders = {kind: network(kind, root / kind) for kind in ("llama", "qwen2", "bert")}
    folders["labels"] = network("llama", root / "labels", labels=3)
    jobs: dict[str, tuple[dict[str, Any], Rows]] = {kind: ({"model": str(folders[kind])}, rows) for kind in list(folders)[:3]}
    jobs["odds"] = {"model": str(folders["labels"]), **LABEL}, few
    jobs["logit"] = {"model": str(folders["labels"]), **LABEL, "label_score": "logit", "truncate": "answer_end"}, few
    return Asked(rows, few, folders, ask(jobs))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
def test_rewards_equal_plain_transformers_row_by_row_and_prompts_are_read_once(kind: str, asked: Asked) -> None:
    expected, lengths = plain(asked.folders[kind], asked.rows, kind)
    found = asked.found[kind]
    assert "error" not in found, found
    for (value, missing), logits, length in zip(found["scores"], expected, lengths, strict=True):
        if length > 512:
            assert (value, missing) == (None, f"{length} tokens exceed the model's limit of 512")
        else:
            assert value == pytest.approx(logits[0], abs=1e-4)
    read = [length for length in lengths if length <= 512]
    assert len(read) == 24
    spread = [logits[0] for logits in expected if logits]
    assert max(spread) - min(spread) > 0.1
    figures = found["figures"]
    assert (figures["num_texts"], figures["num_truncated"]) == (24, 0)
    assert figures["num_tokens"] == figures["num_padded_tokens"] == sum(read)
    if kind == "bert":
        assert figures["num_cached_tokens"] == 0
    else:
        # All but the first answer of each prompt find the whole blocks of 32 tokens of it.
        tokenizer = make_tokenizer()
        prompts = {prompt for prompt, _ in asked.rows}
        ids = [tokenizer(f"<|user|>{p}<|assistant|>", add_special_tokens=False)["input_ids"] for p in prompts]
        shared = sum(5 * (len(each) // 32 * 32) for each in ids)
        assert shared > sum(read) / 3
        assert shared <= figures["num_cached_tokens"] < shared + 24 * 32


def test_labels_cuts_and_engine_arguments_work_as_with_transformers(asked: Asked) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    odds, logit, folder = asked.found["odds"], asked.found["logit"], asked.folders["labels"]
    expected, lengths = plain(folder, asked.few, "llama")
    assert [length > 512 for length in lengths] == [False] * 6 + [True]
    for i, logits in enumerate(expected[:-1]):
        others = torch.tensor(logits)[[0, 2]].logsumexp(0).item()
        assert odds["scores"][i][0] == pytest.approx(logits[1] - others, abs=1e-4)
        assert logit["scores"][i][0] == pytest.approx(logits[1], abs=1e-4)
    assert odds["scores"][-1][0] is None
    assert (logit["figures"]["num_truncated"], logit["figures"]["num_texts"]) == (1, 7)
    tokenizer, (prompt, answer) = make_tokenizer(), asked.few[-1]
    before = tokenizer(f"<|user|>{prompt}<|assistant|>", add_special_tokens=False)["input_ids"]
    cut = tokenizer(answer, add_special_tokens=False)["input_ids"][: 511 - len(before)]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        value = model(input_ids=torch.tensor([[*before, *cut, tokenizer.eos_token_id]])).logits[0, 1].item()
    assert logit["scores"][-1][0] == pytest.approx(value, abs=1e-4)


def two_beginnings(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def padding_is_end(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": config["eos_token_id"]}))


def averaged(folder: Path) -> None:
    modules = [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))


def pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def headless(folder: Path) -> None:
    make_llama(folder, seed=3)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    (folder / "config.json").write_text(json.dumps(config))


def test_what_it_cannot_run_as_transformers_does_is_refused_with_its_own_words(tmp_path: Path) -> None:
    changes: dict[Callable[[Path], None], str] = {
        two_beginnings: "failed its self-test: its texts begin with 2 tokens '<s>'",
        padding_is_end: "its texts end with its padding token '</s>'",
        averaged: "vLLM takes MEAN of its tokens rather than LAST, by modules.json",
        pickled: "does not run in vLLM",
        headless: "has no weights of a head",
    }
    jobs: dict[str, tuple[dict[str, Any], Rows]] = {}
    for change in changes:
        folder = make_llama(tmp_path / change.__name__, seed=3, labels=1)
        change(folder)
        jobs[change.__name__] = {"model": str(folder), "self_test": change is not padding_is_end}, []
    found = ask(jobs)
    for change, words in changes.items():
        error = found[change.__name__].get("error", "no error")
        assert words in error
        assert change.__name__ in error


def test_scoring_actors_of_both_engines_give_the_same(tiny_config: dict[str, Any], tiny_rewards: dict[str, Path]) -> None:
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        rewards = {
            engine: {"kind": "classifier", "model": str(tiny_rewards["helpful"]), "dtype": "float32", "engine": engine}
            for engine in ("transformers", "vllm")
        }
        rows = [
            {
                "prompt_id": f"{i:032x}",
                "prompt": [{"role": "user", "content": prompt}],
                "candidates": [{"text": answer, "token_ids": [1]} for answer in texts(4, i, 1, 40)],
            }
            for i, prompt in enumerate(texts(6, 0, 40, 90))
        ]
        groups = ray.data.from_arrow(pa.Table.from_pylist(rows, schema=schemas.GROUP))
        config = {**tiny_config, "rewards": rewards, "prompts": {"path": "not used"}, "output": "not used"}
        scored = rc_ray.score(config, groups).take_all()
    finally:
        ray.shutdown()
    assert len(scored) == 6
    for row in scored:
        assert len(row["reward.vllm"]) == 4
        assert list(row["reward.vllm"]) == pytest.approx(list(row["reward.transformers"]), abs=1e-4)
