"""Fixtures: tiny random models made on the spot, prompts with every kind of bad row, and the shared preference data."""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import rc_ray
from rc_ray.pipeline.run import RunResult

# Shared machines pause for longer than any useful deadline.
settings.register_profile("default", deadline=None)
settings.load_profile("default")

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Any:
    """A byte-level tokenizer of 260-odd tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["hello world, how are you today?"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_llama(folder: Path, seed: int, labels: int | None = None, **sizes: int) -> Path:
    """A random two-layer Llama of about 100 k parameters, or of other sizes (fields of its configuration); with `labels`, a sequence classifier."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    given = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    config = LlamaConfig(
        **{**given, **sizes},
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.2 if not sizes else 0.02,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    if labels is None:
        model: Any = LlamaForCausalLM(config)
    else:
        config.num_labels = labels
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, adapter: Path, merged: Path, seed: int, rank: int = 4) -> None:
    """A random LoRA adapter in PEFT's format, and its base with the adapter merged in."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets, alpha = ["q_proj", "v_proj", "down_proj"], 2.0 * rank
    tensors = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in targets:
            down = 0.2 * torch.randn(rank, module.in_features, generator=generator)
            up = 0.2 * torch.randn(module.out_features, rank, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            module.weight.data += alpha / rank * (up @ down)
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model.save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "policy", seed=0)


@pytest.fixture(scope="session")
def tiny_rewards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rewards")
    return {name: make_llama(folder / name, seed, labels=1) for seed, name in enumerate(("helpful", "harmless"), 1)}


@pytest.fixture(scope="session")
def eval_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "eval.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"held out {i}?"}) + "\n" for i in range(6)))
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_policy: Path, tiny_rewards: dict[str, Path], eval_prompts: Path) -> dict[str, Any]:
    """A whole configuration on tiny models; `output` and `prompts.path` are for the test to set."""
    return {
        "model": str(tiny_policy),
        "output": "unset",
        "prompts": {"path": "unset"},
        "generation": {
            "num_candidates": 6,
            "max_tokens": 16,
            "max_model_len": 256,
            "dtype": "float32",
            "engine": {"max_num_seqs": 32},
        },
        "rewards": {
            **{name: {"kind": "classifier", "model": str(path)} for name, path in tiny_rewards.items()},
            "length": {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 3}},
        },
        "selection": {"allow_truncated_winner": True},
        "training": {"num_workers": 2, "global_batch_size": 4, "per_device_batch_size": 2, "learning_rate": 1e-3},
        "evaluation": {"prompts": {"path": str(eval_prompts)}, "num_samples": 2, "num_bootstrap": 200},
        "cluster": {"chunk_size": 8, "progress_interval_s": 1},
    }


@pytest.fixture(scope="session")
def small_config(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """The same with one reward model and one training worker, where more of them would only take longer to start."""
    config = copy.deepcopy(tiny_config)
    del config["rewards"]["harmless"]
    config["training"]["num_workers"] = 1
    return config


@pytest.fixture(scope="session")
def mixed_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 good prompts, one of them odd, and one of every kind of bad row: 38 rows."""
    rows: list[Any] = [{"prompt": f"hello world, number {i}?"} for i in range(29)]
    rows += [
        {"prompt": "emoji 😀🇫🇷, right-to-left مرحبا שלום, \u202eodd\u202c"},
        {"prompt": "newlines" + "\n" * 10_000},  # longer than max_model_len
        {"prompt": ""},
        {"prompt": " \n\t "},
        {"prompt": "hello world, number 3?"},  # twice
        {"prompt": 42},
        {"prompt": None},
        {"prompt": [{"role": "user", "content": "fine"}, {"role": "assistant", "content": "but ends wrongly"}]},
        {"other": "no prompt at all"},
    ]
    path = tmp_path_factory.mktemp("data") / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the preference data beside the checkout (../shared/data) are not there")
    return SHARED_DATA


Drawn = list[list[tuple[str, float, float]]]


@pytest.fixture(scope="session")
def alpaca_answers(shared_data: Path) -> Drawn:
    """Per prompt of AlpacaEval, the answers of 55 models: text, log-odds of GPT-4's preference, minus characters.

    The preference is a probability that often saturates; as log-odds it keeps its order and does not tie in float32. Three
    entries are left out: two that game the judge, and the model that the preference compares with.
    """
    prompts: dict[int, list[tuple[str, float, float]]] = {}
    with gzip.open(shared_data / "alpaca_eval" / "pool_weighted_gpt4turbo.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            if row["generator"] not in ("NullModel", "gpt4_gamed", "gpt4_1106_preview"):
                p = min(max(row["pref_vs_gpt4_1106"] - 1, 1e-12), 1 - 1e-12)
                prompts.setdefault(row["pid"], []).append((row["output"], math.log(p / (1 - p)), -float(len(row["output"]))))
    return list(prompts.values())


def sampling_counts(result: RunResult) -> dict[str, Any]:
    """What metrics.json says of the samples, without how long they took."""
    times = {"group_p50_s", "group_p99_s", "group_max_s", "thin_share"}
    return {name: value for name, value in result.metrics["sampling"].items() if name not in times}


@dataclass(frozen=True)
class FinishedRun:
    """A run on tiny models from end to end, made once and shared by the tests that look at its parts; they must not change it."""

    config: dict[str, Any]
    folder: Path
    result: RunResult
    lines: list[str]


@pytest.fixture(scope="session")
def finished_run(tiny_config: dict[str, Any], mixed_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    config = copy.deepcopy(tiny_config)
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    config |= {"output": str(folder), "prompts": {"path": str(mixed_prompts)}}
    lines: list[str] = []
    result = rc_ray.run(config, emit=lines.append)
    return FinishedRun(config, folder, result, lines)
