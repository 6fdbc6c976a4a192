"""Historic defects of reward models, built into tiny ones: each is handled, or caught with its own words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rc_ray.config import ClassifierReward, RewardTrainingConfig
from rc_ray.errors import ConfigError, ModelError
from rc_ray.rewards.classifier import ClassifierRewardModel
from rc_ray.rewards.encoding import encode
from rc_ray.rewards.self_test import ANSWERS as OF_THE_TEST
from rc_ray.rewards.self_test import self_test
from tests.conftest import CHAT_TEMPLATE, make_llama, make_tokenizer

PROMPT = [{"role": "user", "content": "hello, how are you?"}]
ANSWERS = ["fine", "hello " * 20, "how are you today", "", "world " * 7]
Change = Callable[[Any, Any], None]


def changed(folder: Path, change: Change) -> Path:
    """A tiny classifier after a change to its tokenizer and configuration."""
    from transformers import AutoConfig, AutoTokenizer

    make_llama(folder, seed=5, labels=1)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    change(tokenizer, config)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> ClassifierRewardModel:
    config = ClassifierReward(kind="classifier", model=str(folder), dtype="float32", **options)
    return ClassifierRewardModel(config, on_gpu=False, num_threads=1)


def plain(folder: Path, texts: list[str]) -> list[float]:
    """Logits of the last token of each text, one row at a time, from the network itself, so that no padding is involved."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    logits = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits.append(network.score(network.model(input_ids=ids).last_hidden_state[0, -1]).item())
    return logits


def no_padding(tokenizer: Any, config: Any) -> None:
    tokenizer.pad_token = config.pad_token_id = None


def left_padding(tokenizer: Any, config: Any) -> None:
    tokenizer.padding_side = "left"


def own_beginning(tokenizer: Any, config: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE


def turns_begin_with_it(tokenizer: Any, config: Any) -> None:
    """As SmolLM2's, whose padding ends every turn, but not the text: there is a line break after it."""
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }},{{ m['content'] }}</s>,{% endfor %}"
    padding_is_end(tokenizer, config)


def no_padding_but_a_beginning(tokenizer: Any, config: Any) -> None:
    tokenizer.unk_token = None
    no_padding(tokenizer, config)
    own_beginning(tokenizer, config)


def padding_of_the_model_alone(tokenizer: Any, config: Any) -> None:
    tokenizer.pad_token = None
    config.pad_token_id = tokenizer.convert_tokens_to_ids("<|system|>")


def padding_is_end(tokenizer: Any, config: Any) -> None:
    tokenizer.pad_token, config.pad_token_id = tokenizer.eos_token, tokenizer.eos_token_id


def two_beginnings(tokenizer: Any, config: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + CHAT_TEMPLATE


def forgotten_beginning(tokenizer: Any, config: Any) -> None:
    from tokenizers import processors

    token = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[token])


def cut_answers(tokenizer: Any, config: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("m['content']", "m['content'][:40]")


def another_turn(tokenizer: Any, config: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{% if add_generation_prompt %}", "{% if true %}")


def other_padding(tokenizer: Any, config: Any) -> None:
    config.pad_token_id = tokenizer.convert_tokens_to_ids("<|system|>")


@pytest.mark.parametrize(
    "change",
    [no_padding, left_padding, own_beginning, turns_begin_with_it, no_padding_but_a_beginning, padding_of_the_model_alone],
    ids=lambda change: change.__name__,
)
def test_what_can_be_handled_gives_the_rewards_of_the_plain_network(change: Change, tmp_path: Path) -> None:
    folder = changed(tmp_path, change)
    begin = "<s>" if change in (own_beginning, no_padding_but_a_beginning) else ""
    texts = [f"{begin}<|user|>{PROMPT[0]['content']}<|assistant|>{answer}</s>" for answer in ANSWERS]
    if change is turns_begin_with_it:
        texts = [f"<s>user,{PROMPT[0]['content']}</s>,<s>assistant,{answer}</s>," for answer in ANSWERS]
    scores = load(folder).score([PROMPT] * len(ANSWERS), ANSWERS)
    assert [s.value for s in scores] == pytest.approx(plain(folder, texts), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (padding_is_end, "padding token '</s>' also occurs in its texts"),
        (two_beginnings, "begin with 2 tokens '<s>'"),
        (forgotten_beginning, "its chat template does not"),
        (cut_answers, "does not read answers to their end"),
        (another_turn, "'</s><|assistant|>', which begins another turn"),
        (other_padding, "in a padded batch"),
    ],
)
def test_what_cannot_is_caught_with_its_own_words(change: Change, words: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, change)
    with pytest.raises(ModelError, match="failed its self-test") as caught:
        load(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert load(folder, self_test=False).score([PROMPT], ["fine"])[0].value is not None


def test_the_answer_of_a_pair_of_texts_has_no_beginning_of_its_own() -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.chat_template, start = None, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", start)]
    )
    question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROMPT[0]["content"], "fine"))
    whole = encode(tokenizer, PROMPT, "fine")
    assert whole["input_ids"] == [start, *question, *answer]
    length = len(whole["input_ids"])
    assert len(whole["attention_mask"]) == length
    assert encode(tokenizer, PROMPT, "fine", length - 1, "answer_end")["input_ids"] == [start, *question, *answer[:-1]]
    assert encode(tokenizer, PROMPT, "fine", length - 1, "prompt_start")["input_ids"] == [start, *question[1:], *answer]


def by_position(values: list[float], lengths: list[int]) -> list[float]:
    return [value + i for i, value in enumerate(values)]


def padded_is_no_number(values: list[float], lengths: list[int]) -> list[float]:
    return [value if length == max(lengths) else float("nan") for value, length in zip(values, lengths, strict=True)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (by_position, r"by itself and .* in a padded batch"),
        (padded_is_no_number, r"the reward [-\d.]+ by itself and no reward \(score is nan\) in a padded batch"),
    ],
)
def test_a_reward_that_depends_on_its_company_is_caught(
    change: Callable[[list[float], list[int]], list[float]], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(make_llama(tmp_path, seed=5, labels=1))
    forward = model._forward
    monkeypatch.setattr(
        model, "_forward", lambda encoded: change(forward(encoded), [len(each["input_ids"]) for each in encoded])
    )
    with pytest.raises(ModelError, match=words):
        self_test(model, "m")


def test_rewards_that_change_places_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_llama(tmp_path, seed=5, labels=1))
    score = model.score

    def turned(prompts: list[Any], answers: list[str]) -> list[Any]:
        return score(prompts, answers)[:: -1 if answers == OF_THE_TEST[::-1] else 1]

    monkeypatch.setattr(model, "score", turned)
    with pytest.raises(ModelError, match=r"by itself and .* in another order"):
        self_test(model, "m")


def test_code_of_a_model_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    folder, marker = make_llama(tmp_path / "model", seed=5, labels=1), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(
        f"from transformers import LlamaForSequenceClassification\nopen({str(marker)!r}, 'w').close()\n\n\n"
        "class Own(LlamaForSequenceClassification):\n    pass\n"
    )
    load(folder)
    assert not marker.exists()
    load(folder, trust_remote_code=True)
    assert marker.exists()


def test_a_limit_that_no_text_fits_is_no_failure(tmp_path: Path) -> None:
    model = load(make_llama(tmp_path, seed=5, labels=1), max_length=8)
    assert model.score([PROMPT], ["fine"])[0].value is None
    assert len(encode(model.tokenizer, PROMPT, "fine")["input_ids"]) > 8


def test_texts_are_looked_at_before_a_reward_model_is_trained_on_them(tmp_path: Path) -> None:
    from rc_ray.training.reward_model import prepare

    rows = [{"prompt": f"question {i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for change, words in (
        (two_beginnings, "begin with 2 tokens '<s>'"),
        (padding_is_end, "padding token '</s>' also ends its texts"),
    ):
        base = changed(tmp_path / change.__name__, change)
        with pytest.raises(ModelError, match=rf"base = .*{words}"):
            prepare(str(tmp_path / "pairs.jsonl"), str(tmp_path / "output"), RewardTrainingConfig(base=str(base)))
    base = changed(tmp_path / "base", left_padding)
    with pytest.raises(ConfigError, match=r"max_length = 1024: the base .* reads at most 512 tokens"):
        prepare(str(tmp_path / "pairs.jsonl"), str(tmp_path / "output"), RewardTrainingConfig(base=str(base), max_length=1024))
    assert not (tmp_path / "output").exists()
