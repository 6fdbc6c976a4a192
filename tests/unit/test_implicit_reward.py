"""Implicit rewards: against log-probs computed one row at a time, and what has no reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rc_ray.config import ImplicitReward, load_config
from rc_ray.errors import ModelError
from rc_ray.pipeline.stages import check_rewards
from rc_ray.rewards.base import build_reward
from rc_ray.rewards.language_model import LanguageModel
from tests.conftest import CHAT_TEMPLATE, make_llama
from tests.unit.test_config import GOOD

PROMPTS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how are you today, world?"}],
]
ANSWERS = ["fine", "", "hello " * 30, "how are you?", "world", "today " * 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("implicit")
    return {"policy": make_llama(root / "policy", seed=1), "reference": make_llama(root / "reference", seed=2)}


def reward(folders: dict[str, Path], **options: Any) -> Any:
    config = ImplicitReward(
        kind="implicit", **{name: str(path) for name, path in folders.items()}, **{"dtype": "float32", **options}
    )
    return build_reward(config, on_gpu=False, num_threads=1)


def log_prob(folder: Path, prompt: list[dict[str, str]], answer: str) -> float:
    """By plain transformers: the log-softmax of every answer token, from a text without padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = "".join(f"<|{m['role']}|>{m['content']}" for m in prompt) + "<|assistant|>"
    start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    ids = tokenizer(f"{before}{answer}</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        probs = network(input_ids=ids).logits[0].log_softmax(-1)
    return sum(probs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))


@pytest.mark.parametrize("max_batch_tokens", [64, 4096])
def test_rewards_equal_those_of_plain_transformers_row_by_row(folders: dict[str, Path], max_batch_tokens: int) -> None:
    prompts = [PROMPTS[i % 2] for i in range(len(ANSWERS))]
    expected = [
        0.3 * (log_prob(folders["policy"], p, a) - log_prob(folders["reference"], p, a))
        for p, a in zip(prompts, ANSWERS, strict=True)
    ]
    assert max(expected) - min(expected) > 0.1
    scores = reward(folders, beta=0.3, max_batch_tokens=max_batch_tokens).score(prompts, ANSWERS)
    assert [s.value for s in scores] == pytest.approx(expected, abs=1e-4)


def test_a_policy_that_is_its_reference_prefers_nothing(folders: dict[str, Path]) -> None:
    same = reward({"policy": folders["policy"], "reference": folders["policy"]})
    assert [s.value for s in same.score([PROMPTS[0]] * len(ANSWERS), ANSWERS)] == [0.0] * len(ANSWERS)


def test_a_text_over_the_limit_is_missing_and_says_where(folders: dict[str, Path]) -> None:
    short, long = reward(folders, max_length=40).score([PROMPTS[0]] * 2, ["fine", "hello " * 60])
    assert short.value is not None
    assert long.value is None
    assert long.missing.startswith("policy: ")
    assert "limit of 40" in long.missing


def test_templates_that_hide_where_the_answer_begins_give_no_reward(tmp_path: Path, folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    odd = make_llama(tmp_path / "odd", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(odd)
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    tokenizer.save_pretrained(odd)
    (score,) = reward({**folders, "reference": odd}).score([PROMPTS[0]], ["fine"])
    assert score.value is None
    assert score.missing == "reference: its chat template renders the conversation differently with and without an answer"
    tokenizer.chat_template = None
    tokenizer.save_pretrained(odd)
    for file in odd.glob("chat_template*"):
        file.unlink()
    with pytest.raises(ModelError, match="no chat template"):
        reward({**folders, "reference": odd})


def test_a_token_of_prompt_and_answer_together_is_the_answers(tmp_path: Path) -> None:
    import torch

    folder = make_llama(tmp_path, seed=1)
    model = LanguageModel(str(folder), None, False, "float32", False, 2048)
    begun = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>hel{% endif %}")
    model.tokenizer.chat_template = begun.replace(
        "|>{{ m['content'] }}", "|>{% if m['role'] == 'assistant' %}hel{% endif %}{{ m['content'] }}"
    )
    whole, before = (
        model.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("<|user|>hello<|assistant|>hello world</s>", "<|user|>hello<|assistant|>hel")
    )
    start = before.index(model.tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
    assert whole[: len(before)] != before
    assert whole[:start] == before[:start]
    with torch.inference_mode():
        probs = model._model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(probs[t - 1, whole[t]].item() for t in range(start, len(whole)))
    (score,) = model.logprobs([PROMPTS[0]], ["lo world"])
    assert score.value == pytest.approx(expected, abs=1e-4)


def test_both_models_are_checked_by_their_fields(folders: dict[str, Path]) -> None:
    rewards = {"aligned": {"kind": "implicit", "policy": str(folders["policy"]), "reference": "/no/such/folder"}}
    config = load_config({**GOOD, "rewards": {**rewards, "length": GOOD["rewards"]["length"]}})
    with pytest.raises(ModelError, match=r"rewards\.aligned\.reference = '/no/such/folder'"):
        check_rewards(config)


def test_both_models_pass_the_self_test_or_end_the_run(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    begun_twice = make_llama(tmp_path, seed=2)
    tokenizer = AutoTokenizer.from_pretrained(begun_twice)
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(begun_twice)
    for side in ("policy", "reference"):
        models = {**folders, side: begun_twice}
        with pytest.raises(ModelError, match=rf"failed its self-test: {side}: its texts begin with 2 tokens '<s>'"):
            reward(models)
        assert reward(models, self_test=False).score([PROMPTS[0]], ["fine"])[0].value is not None

    forward = LanguageModel._forward
    monkeypatch.setattr(LanguageModel, "_forward", lambda self, *batch: [v + i for i, v in enumerate(forward(self, *batch))])
    with pytest.raises(
        ModelError, match=r"self-test: policy: an answer has the log-prob .* by itself and .* in a padded batch"
    ):
        reward(folders)


def test_the_self_test_is_not_counted(folders: dict[str, Path]) -> None:
    assert set(reward(folders).figures().values()) == {0}
