"""LoRA adapters of classifiers: merged rewards against PEFT's own unmerged network, and adapters that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rc_ray.config import ClassifierReward, load_config
from rc_ray.errors import ConfigError, ModelError, ResumeError
from rc_ray.ledger import rundir
from rc_ray.pipeline import stages
from rc_ray.rewards.classifier import ClassifierRewardModel
from tests.conftest import CHAT_TEMPLATE, make_llama, make_tokenizer
from tests.unit.test_config import GOOD

PROMPT = [{"role": "user", "content": "hello, how are you?"}]
ANSWERS = ["fine", "hello " * 20, "how are you today", "", "world " * 7]
TEXTS = [f"<|user|>{PROMPT[0]['content']}<|assistant|>{answer}</s>" for answer in ANSWERS]


def make_adapter(base: Path, folder: Path, labels: int = 1) -> list[list[float]]:
    """Saves a random LoRA adapter with a random head, by PEFT; the logits of `TEXTS` with it, one row at a time and unmerged."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(7)
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    network = get_peft_model(network, lora).eval()
    for name, parameter in network.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)
    tokenizer, logits = AutoTokenizer.from_pretrained(base), []
    with torch.inference_mode():
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            logits.append(network(input_ids=ids).logits[0].tolist())
    return logits


def load(base: Path, **options: Any) -> ClassifierRewardModel:
    config = ClassifierReward(kind="classifier", model=str(base), dtype="float32", **options)
    return ClassifierRewardModel(config, on_gpu=False, num_threads=1)


def values(model: ClassifierRewardModel) -> list[float | None]:
    return [score.value for score in model.score([PROMPT] * len(ANSWERS), ANSWERS)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[float]]:
    """A classifier, an adapter of it, and the rewards with it."""
    folder = tmp_path_factory.mktemp("tuned")
    base = make_llama(folder / "base", seed=4, labels=1)
    return base, folder / "adapter", [row[0] for row in make_adapter(base, folder / "adapter")]


def test_rewards_are_those_of_the_unmerged_network_and_nothing_of_peft_is_left(tuned: tuple[Path, Path, list[float]]) -> None:
    base, adapter, expected = tuned
    model = load(base, adapter=str(adapter))
    assert values(model) == pytest.approx(expected, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(expected, values(load(base)), strict=True)) > 0.1
    plain = load(base).model
    assert [n for n, _ in model.model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert type(model.model) is type(plain)
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert model.model.score.weight.tolist() == head.tolist()


def test_a_head_that_only_the_adapter_has_is_taken_and_without_it_the_base_is_refused(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", seed=4)
    expected = make_adapter(base, tmp_path / "adapter", labels=3)
    model = load(base, adapter=str(tmp_path / "adapter"), label=2, label_score="logit")
    assert values(model) == pytest.approx([row[2] for row in expected], abs=1e-4)
    with pytest.raises(ModelError, match=r"has no weights for score\.weight, which would be random"):
        load(base, label=0)


def test_half_precision_networks_stay_of_one_dtype(tuned: tuple[Path, Path, list[float]]) -> None:
    base, adapter, expected = tuned
    config = ClassifierReward(kind="classifier", model=str(base), adapter=str(adapter), dtype="bfloat16")
    model = ClassifierRewardModel(config, on_gpu=False, num_threads=1)
    assert {str(p.dtype) for p in model.model.parameters()} == {"torch.bfloat16"}
    assert values(model) == pytest.approx(expected, abs=0.3)


def test_the_tokenizer_of_the_adapter_counts(tuned: tuple[Path, Path, list[float]], tmp_path: Path) -> None:
    base, adapter, _ = tuned
    folder = tmp_path / "own"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model = load(base, adapter=str(folder))
    assert model.tokenizer.chat_template == tokenizer.chat_template
    assert values(model) != pytest.approx(values(load(base, adapter=str(adapter))), abs=1e-3)


def copied(adapter: Path, folder: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """An adapter with other tensors or another configuration."""
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors or load_file(adapter / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_that_does_not_fit_is_refused(tuned: tuple[Path, Path, list[float]], tmp_path: Path) -> None:
    base, adapter, _ = tuned
    tensors = load_file(adapter / "adapter_model.safetensors")
    lora = {name for name in tensors if "lora_" in name}
    first = sorted(lora)[0]
    cases = {
        "lacking": {name: value for name, value in tensors.items() if name != first},
        "headless": {name: value for name, value in tensors.items() if name in lora},
        "beyond": tensors | {first.replace("layers.0", "layers.7"): tensors[first].clone()},
        "misshapen": tensors | {first: tensors[first][:, :-1].contiguous()},
    }
    for case, found in cases.items():
        folder = copied(adapter, tmp_path / case, found)
        with pytest.raises(ModelError, match="does not fit its model") as caught:
            load(base, adapter=str(folder))
        assert str(folder) in str(caught.value)
    with pytest.raises(ModelError, match="peft_type is 'IA3', and only LORA is supported"):
        load(base, adapter=str(copied(adapter, tmp_path / "ia3", peft_type="IA3")))


def configured(base: Path, adapter: Path, output: Path | str = "unset") -> Any:
    rewards = {
        "tuned": {"kind": "classifier", "model": str(base), "adapter": str(adapter)},
        "length": GOOD["rewards"]["length"],
    }
    return load_config({**GOOD, "model": str(base), "output": str(output), "rewards": rewards})


def test_pickled_adapters_are_refused_before_anything_starts(tuned: tuple[Path, Path, list[float]], tmp_path: Path) -> None:
    base, adapter, _ = tuned
    stages.check_rewards(configured(base, adapter))
    with pytest.raises(ModelError, match=r"rewards\.tuned\.adapter = .*the folder does not exist"):
        stages.check_rewards(configured(base, tmp_path / "nowhere"))
    pickled = copied(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"rewards\.tuned\.adapter = .*no adapter_model\.safetensors"):
        stages.check_rewards(configured(base, pickled))
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors \(pickled weights are not read"):
        load(base, adapter=str(pickled))


def test_a_run_goes_on_only_with_the_adapter_it_began_with(tuned: tuple[Path, Path, list[float]], tmp_path: Path) -> None:
    base, adapter, _ = tuned
    mine = copied(adapter, tmp_path / "mine")
    config = configured(base, mine, tmp_path / "run")
    run = rundir.create(config, {})
    stages.pin_models(config, run)
    assert set(run.manifest()["models"]) == {str(base), str(mine)}
    stages.pin_models(config, run)
    (mine / "adapter_config.json").write_text((mine / "adapter_config.json").read_text() + "\n")
    with pytest.raises(ResumeError, match=f"the run began with other models \\({mine}: sha:"):
        stages.pin_models(config, run)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter_revision=main"], "adapter_revision has no effect without adapter"),
        (["adapter=a", "engine=vllm"], "adapter is merged into the model by engine: transformers only"),
        (["engine_arguments={block_size: 32}"], "engine_arguments have no effect with engine: transformers"),
        (["engine=vllm", "engine_arguments={dtype: half}"], "engine_arguments.dtype is not for you to set: set `dtype`"),
        (["engine=vllm", "engine_arguments={load_format: pt}"], "weights are read from safetensors only"),
        (["engine=vllm", "engine_arguments={enable_lora: true}"], "engine_arguments.enable_lora is not for you to set"),
        (["engine=vllm", "pool={num_gpus: 2}"], "more than the one device that engine: vllm uses"),
    ],
)
def test_options_that_cannot_take_effect_are_errors(overrides: list[str], words: str) -> None:
    rewards = {"x": {"kind": "classifier", "model": "m"}, "length": GOOD["rewards"]["length"]}
    with pytest.raises(ConfigError) as caught:
        load_config({**GOOD, "rewards": rewards}, [f"rewards.x.{each}" for each in overrides])
    assert words in str(caught.value)


def test_adapters_and_engines_change_results_and_unknown_engine_arguments_are_named(tmp_path: Path) -> None:
    from rc_ray.config import fingerprint

    rewards = {
        "x": {"kind": "classifier", "model": str(make_llama(tmp_path / "m", 0, labels=1))},
        "y": GOOD["rewards"]["length"],
    }
    raw = {**GOOD, "rewards": rewards}
    changes = [[], ["adapter=a"], ["adapter=b"], ["engine=vllm"], ["truncate=answer_end"], ["truncate=prompt_start"]]
    configs = [load_config(raw, [f"rewards.x.{each}" for each in change]) for change in changes]
    assert len({fingerprint(config) for config in configs}) == len(changes)
    wrong = load_config(raw, ["rewards.x.engine=vllm", "rewards.x.engine_arguments={gpu_memory_utilisation: 0.5}"])
    with pytest.raises(ConfigError, match=r"rewards\.x\.engine_arguments\.gpu_memory_utilisation = 0\.5.*utilization"):
        stages.check_rewards(wrong)
