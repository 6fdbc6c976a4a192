"""Texts that are cut on request: which tokens go, what stays, what has no reward all the same, and how much was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rc_ray.config import ClassifierReward, ImplicitReward, RuleReward
from rc_ray.core.ids import Message
from rc_ray.errors import ModelError
from rc_ray.rewards.base import FIGURES, build_reward, figures_of
from rc_ray.rewards.classifier import ClassifierRewardModel
from rc_ray.rewards.encoding import Side, encode
from tests.conftest import CHAT_TEMPLATE, make_llama, make_tokenizer
from tests.unit.test_rewards import pair_tokenizer

TOKENIZER = make_tokenizer()
PROMPT: list[Message] = [{"role": "user", "content": "hello world, " * 8}]
SIDES: list[Side] = ["prompt_start", "answer_end"]
contents = st.text("ab h<|>é😀\n", min_size=0, max_size=30)


def ids(content: str) -> list[int]:
    return list(TOKENIZER(content, add_special_tokens=False)["input_ids"])


@given(st.lists(contents, min_size=1, max_size=3), contents, st.integers(1, 40), st.sampled_from(SIDES))
def test_tokens_of_messages_go_and_the_template_stays(prompt: list[str], answer: str, surplus: int, side: Side) -> None:
    roles = ["system", "user", "user"][-len(prompt) :]
    messages = [{"role": role, "content": content} for role, content in zip(roles, prompt, strict=True)]
    # The template's tokens are special ones, so messages are tokenized by themselves: (token, whether it may go).
    whole = [t for m in messages for t in [(ids(f"<|{m['role']}|>")[0], False), *((i, True) for i in ids(m["content"]))]]
    whole = whole if side == "prompt_start" else [(i, False) for i, _ in whole]
    rest = [(ids("<|assistant|>")[0], False), *((i, side == "answer_end") for i in ids(answer)), (ids("</s>")[0], False)]
    whole += rest
    assert encode(TOKENIZER, messages, answer)["input_ids"] == [i for i, _ in whole]
    may_go = [number for number, (_, may) in enumerate(whole) if may]
    limit = len(whole) - surplus
    if surplus >= len(may_go):
        with pytest.raises(ValueError, match=f"{len(whole)} tokens exceed {limit}, and the .* has only {len(may_go)} of them"):
            encode(TOKENIZER, messages, answer, limit, side)
        return
    gone = may_go[:surplus] if side == "prompt_start" else may_go[-surplus:]
    cut = encode(TOKENIZER, messages, answer, limit, side)
    assert cut["input_ids"] == [i for number, (i, _) in enumerate(whole) if number not in gone]
    assert cut["attention_mask"] == [1] * limit


def test_a_text_that_fits_is_not_cut() -> None:
    whole = encode(TOKENIZER, PROMPT, "fine")
    assert encode(TOKENIZER, PROMPT, "fine", len(whole["input_ids"]), "answer_end") == whole


def test_a_pair_loses_tokens_of_the_part_asked_for() -> None:
    tokenizer, prompt = pair_tokenizer(), [{"role": "user", "content": "a b c d"}]
    left, right = (encode(tokenizer, prompt, "yes no yes", 8, side) for side in SIDES)
    assert " ".join(tokenizer.convert_ids_to_tokens(left["input_ids"])) == "[CLS] c d [SEP] yes no yes [SEP]"
    assert " ".join(tokenizer.convert_ids_to_tokens(right["input_ids"])) == "[CLS] a b c d [SEP] yes [SEP]"
    assert right["token_type_ids"] == [0] * 6 + [1] * 2
    with pytest.raises(ValueError, match="10 tokens exceed 7, and the answer has only 3 of them"):
        encode(tokenizer, prompt, "yes no yes", 7, "answer_end")


def test_templates_that_trim_are_cut_and_those_that_rewrite_are_not() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
    whole = encode(tokenizer, PROMPT, "  fine\n")["input_ids"]
    assert whole == encode(TOKENIZER, [{"role": "user", "content": PROMPT[0]["content"].strip()}], "fine")["input_ids"]
    assert encode(tokenizer, PROMPT, "  fine\n", len(whole) - 1)["input_ids"] == [whole[0], *whole[2:]]
    tokenizer.chat_template = CHAT_TEMPLATE.replace("m['content']", "m['content'] | upper")
    with pytest.raises(ValueError, match="its chat template changes messages"):
        encode(tokenizer, PROMPT, "fine", 10)


def load(folder: Path, **options: Any) -> ClassifierRewardModel:
    config = ClassifierReward(kind="classifier", model=str(folder), dtype="float32", **options)
    return ClassifierRewardModel(config, on_gpu=False, num_threads=1)


def of_ids(model: ClassifierRewardModel, tokens: list[int]) -> float:
    """By the plain network, without padding."""
    import torch

    with torch.inference_mode():
        return float(model.model(input_ids=torch.tensor([tokens])).logits[0, 0])


@pytest.mark.parametrize("side", SIDES)
def test_a_cut_text_is_scored_as_what_is_left_of_it_and_counted(side: Side, tiny_rewards: dict[str, Path]) -> None:
    answers = ["fine", "hello " * 30, "how are you", "today " * 200, "world"]
    model = load(tiny_rewards["helpful"], truncate=side, max_length=90)
    whole = [encode(model.tokenizer, PROMPT, answer)["input_ids"] for answer in answers]
    assert [len(each) > 90 for each in whole] == [False, True, False, True, False]
    scores = model.score([PROMPT] * 5, answers)
    if side == "prompt_start":  # the prompt is shorter than what would have to go
        assert scores[3].value is None
        assert scores[3].missing.startswith(
            f"truncate = prompt_start: {len(whole[3])} tokens exceed 90, and the prompt has only"
        )
        del scores[3], answers[3]
    left = [encode(model.tokenizer, PROMPT, answer, 90, side)["input_ids"] for answer in answers]
    assert [s.value for s in scores] == pytest.approx([of_ids(model, each) for each in left], abs=1e-5)
    figures = model.figures()
    assert (figures["num_texts"], figures["num_truncated"]) == (len(answers), len(answers) - 3)
    assert figures["num_tokens"] == sum(map(len, left))
    # Unless asked for, no text is cut.
    assert load(tiny_rewards["helpful"], max_length=90).score([PROMPT], ["hello " * 30])[0].value is None


def test_a_tokenizer_that_does_not_know_where_its_tokens_are_cannot_cut(
    tiny_rewards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_rewards["helpful"]
    monkeypatch.setattr(type(load(folder).tokenizer), "is_fast", False)
    load(folder)
    with pytest.raises(ModelError, match=r"truncate = 'answer_end': the tokenizer of .* remove `truncate`"):
        load(folder, truncate="answer_end")


def test_figures_say_what_was_read_since_the_model_was_loaded(
    tiny_rewards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_rewards["helpful"], max_batch_tokens=256)
    assert model.figures() == dict.fromkeys(FIGURES, 0)
    forward, padded = model._forward, []

    def watched(encoded: list[dict[str, list[int]]]) -> list[float]:
        padded.append(len(encoded) * max(len(each["input_ids"]) for each in encoded))
        return forward(encoded)

    monkeypatch.setattr(model, "_forward", watched)
    answers = ["hello " * n for n in (1, 50, 3, 900, 20, 20)]
    for _ in range(2):
        model.score([PROMPT] * len(answers), answers)
    lengths = [len(encode(model.tokenizer, PROMPT, answer)["input_ids"]) for answer in answers]
    read = [length for length in lengths if length <= 512]
    assert len(read) == 5
    assert figures_of(model) == {
        "num_texts": 10,
        "num_too_long": 2,
        "num_truncated": 0,
        "num_tokens": 2 * sum(read),
        "num_padded_tokens": sum(padded),
        "num_cached_tokens": 0,
    }
    assert sum(padded) > 2 * sum(read)


def test_figures_of_implicit_rewards_are_of_both_models_and_rules_have_none(tmp_path: Path) -> None:
    folders = {name: str(make_llama(tmp_path / name, seed)) for seed, name in enumerate(("policy", "reference"))}
    reward = build_reward(ImplicitReward(kind="implicit", dtype="float32", **folders), on_gpu=False, num_threads=1)
    assert reward.score([PROMPT], ["fine"])[0].value is not None
    length = len(encode(TOKENIZER, PROMPT, "fine")["input_ids"])
    read = {"num_texts": 2, "num_tokens": 2 * length, "num_padded_tokens": 2 * length}
    assert figures_of(reward) == dict.fromkeys(FIGURES, 0) | read
    rule = RuleReward(kind="rule", function="rc_ray.rewards.rules:length_near", args={"target_words": 2})
    assert figures_of(build_reward(rule, on_gpu=False, num_threads=1)) == {}
