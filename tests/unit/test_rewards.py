"""Rewards: rules and what goes wrong in them, how a conversation is encoded, the classifier against a plain forward pass."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rc_ray.config import ClassifierReward, RuleReward
from rc_ray.core.ids import Message
from rc_ray.errors import ConfigError, ModelError
from rc_ray.models.resolve import check_model
from rc_ray.rewards.base import Score, build_reward
from rc_ray.rewards.batches import TokenBatches, length_limit
from rc_ray.rewards.classifier import ClassifierRewardModel
from rc_ray.rewards.encoding import encode
from rc_ray.rewards.rule import RuleRewardFunction, load_function
from rc_ray.rewards.rules import length_near, matches
from tests.conftest import make_llama, make_tokenizer

PROMPT: list[Message] = [{"role": "user", "content": "hello, how are you?"}]
ANSWERS = [
    ("hello " * n).strip() + f" {i}" for i, n in enumerate([1, 30, 2, 7, 1, 12, 45, 3, 0, 22, 5, 9, 2, 60, 4, 17, 33, 1, 8, 26])
]


def raises(prompts: list[Any], answers: list[str]) -> list[float | None]:
    raise KeyError("no such field")


def too_few(prompts: list[Any], answers: list[str]) -> list[float | None]:
    return [1.0]


def odd_values(prompts: list[Any], answers: list[str]) -> list[float | None]:
    return [1, None, math.nan, -math.inf, 0.5]


def no_list(prompts: list[Any], answers: list[str]) -> None:
    return None


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        ("no_such_module_xyz:f", {}, ["no_such_module_xyz", "importable on every node"]),
        ("rc_ray.rewards.rules:length_nea", {}, ["length_nea", "rc_ray.rewards.rules", "check the name"]),
        ("rc_ray.rewards.rules:length_near", {}, ["target_words", "f(prompts, answers, **args)"]),
        ("rc_ray.rewards.rules:length_near", {"target": 3}, ["{'target': 3}", "f(prompts, answers, **args)"]),
        ("math:pi", {}, ["math:pi", "f(prompts, answers, **args)"]),
    ],
)
def test_a_rule_that_cannot_be_called_is_a_configuration_error(function: str, args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_function(function, args)
    for word in words:
        assert word in str(caught.value)


def test_an_exception_in_a_rule_reaches_the_caller() -> None:
    with pytest.raises(KeyError, match="no such field"):
        RuleRewardFunction(f"{__name__}:raises", {}).score([PROMPT] * 2, ["a", "b"])


def test_a_rule_with_the_wrong_number_of_values_is_an_error() -> None:
    with pytest.raises(ValueError, match="too_few returned 1 values for 3 answers"):
        RuleRewardFunction(f"{__name__}:too_few", {}).score([PROMPT] * 3, ["a", "b", "c"])
    with pytest.raises(TypeError):
        RuleRewardFunction(f"{__name__}:no_list", {}).score([PROMPT], ["a"])


def test_values_that_are_no_finite_number_are_missing_one_by_one() -> None:
    scores = RuleRewardFunction(f"{__name__}:odd_values", {}).score([PROMPT] * 5, ["a"] * 5)
    assert [s.value for s in scores] == [1.0, None, None, None, 0.5]
    assert [s.missing for s in scores] == ["", "no score returned", "score is nan", "score is -inf", ""]


def test_length_near_is_minus_the_distance_in_words() -> None:
    answers = ["one two three", "one", "", "a  b\nc\td e"]
    assert length_near([PROMPT] * 4, answers, target_words=3) == [0.0, -2.0, -3.0, -2.0]


def test_matches_is_one_where_the_pattern_is_found() -> None:
    assert matches([PROMPT] * 3, ["the answer is 42", "no number", "7"], pattern=r"\d+") == [1.0, 0.0, 1.0]
    assert matches([PROMPT], ["the answer is 42"], pattern=r"^\d+$") == [0.0]


def test_build_reward_makes_the_kind_that_is_configured(tiny_rewards: dict[str, Path]) -> None:
    rule = RuleReward(kind="rule", function="rc_ray.rewards.rules:length_near", args={"target_words": 2})
    assert build_reward(rule, on_gpu=False, num_threads=1).score([PROMPT], ["a b c"]) == [Score(-1.0)]
    classifier = ClassifierReward(kind="classifier", model=str(tiny_rewards["helpful"]))
    assert isinstance(build_reward(classifier, on_gpu=False, num_threads=1), ClassifierRewardModel)


def pair_tokenizer() -> Any:
    """A word-level tokenizer that joins a pair as BERT does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "user", "assistant", ":", "a", "b", "c", "d", "yes", "no", "secret"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=inputs)


def test_a_chat_template_sees_the_whole_conversation_and_the_answer_once() -> None:
    tokenizer = make_tokenizer()
    messages = [{"role": "system", "content": "brief"}, *PROMPT]
    encoded = encode(tokenizer, messages, "fine")
    text = "<|system|>brief<|user|>hello, how are you?<|assistant|>fine</s>"
    assert encoded["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded["attention_mask"] == [1] * len(encoded["input_ids"])
    with pytest.raises(ValueError, match="tokens exceed 5"):
        encode(tokenizer, messages, "fine", max_length=5)


def test_a_tokenizer_without_template_gets_prompt_and_answer_as_a_pair() -> None:
    tokenizer = pair_tokenizer()
    encoded = encode(tokenizer, [{"role": "system", "content": "secret"}, {"role": "user", "content": "a b"}], "yes")
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == ["[CLS]", "a", "b", "[SEP]", "yes", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert encoded["attention_mask"] == [1] * 6


def test_several_turns_of_a_pair_carry_their_roles() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    tokenizer = pair_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, turns, "no")["input_ids"])
    assert " ".join(tokens) == "[CLS] user : a assistant : b user : c [SEP] no [SEP]"


def test_training_may_leave_out_the_oldest_part_of_the_prompt_of_a_pair() -> None:
    tokenizer = pair_tokenizer()
    encoded = encode(tokenizer, [{"role": "user", "content": "a b c d"}], "yes no", max_length=7)
    assert " ".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"])) == "[CLS] c d [SEP] yes no [SEP]"


def test_the_shorter_of_the_limits_of_model_and_tokenizer_holds() -> None:
    from transformers import BertConfig, Gemma3Config, LlamaConfig, RobertaConfig, XLNetConfig

    short, none = SimpleNamespace(model_max_length=512), SimpleNamespace(model_max_length=10**30)
    assert length_limit(short, BertConfig(max_position_embeddings=514)) == 512
    assert length_limit(none, LlamaConfig(max_position_embeddings=2048)) == 2048
    assert length_limit(none, LlamaConfig(max_position_embeddings=2048), 100) == 100
    # The table of 514 begins at the padding token's 1 + 1.
    assert length_limit(none, RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert length_limit(none, Gemma3Config(text_config={"max_position_embeddings": 4096})) == 4096
    assert length_limit(none, XLNetConfig()) is None


def test_a_slow_tokenizer_reads_pairs_and_cuts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BatchEncoding

    tokenizer = pair_tokenizer()
    expected = encode(tokenizer, PROMPT, "yes")

    def unknown(*_: Any) -> NoReturn:
        raise ValueError("not available when using Python based tokenizers")

    monkeypatch.setattr(BatchEncoding, "sequence_ids", unknown)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert encode(tokenizer, PROMPT, "yes") == expected
    with pytest.raises(ValueError, match="does not say which token is where"):
        encode(tokenizer, PROMPT, "yes", max_length=3)


@pytest.fixture(scope="module")
def model(tiny_rewards: dict[str, Path]) -> ClassifierRewardModel:
    # A small budget, so that the answers make several batches.
    config = ClassifierReward(kind="classifier", model=str(tiny_rewards["helpful"]), max_batch_tokens=256, dtype="float32")
    return ClassifierRewardModel(config, on_gpu=False, num_threads=1)


@pytest.fixture(scope="module")
def expected(tiny_rewards: dict[str, Path]) -> list[float]:
    """The logit of every answer from plain transformers, one row at a time, without padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_rewards["helpful"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    logits = []
    for answer in ANSWERS:
        text = f"<|user|>{PROMPT[0]['content']}<|assistant|>{answer}</s>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits.append(plain(input_ids=ids).logits.item())
    # Rewards that were all alike would make the tests below empty.
    assert max(logits) - min(logits) > 0.1
    return logits


def values(model: ClassifierRewardModel, answers: list[str]) -> list[float | None]:
    return [score.value for score in model.score([PROMPT] * len(answers), answers)]


def test_scores_equal_a_plain_forward_pass_row_by_row(model: ClassifierRewardModel, expected: list[float]) -> None:
    assert values(model, ANSWERS) == pytest.approx(expected, abs=1e-5)


def test_scores_do_not_depend_on_order_or_company(model: ClassifierRewardModel, expected: list[float]) -> None:
    assert values(model, ANSWERS[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert [values(model, [answer])[0] for answer in ANSWERS] == pytest.approx(expected, abs=1e-5)


def test_prompts_and_answers_are_scored_together(model: ClassifierRewardModel) -> None:
    other = [{"role": "user", "content": "something else entirely"}]
    first, second = model.score([PROMPT, other], ["same answer", "same answer"])
    assert first.value != second.value
    with pytest.raises(ValueError, match="argument"):
        model.score([PROMPT], ["one", "two"])
    assert model.score([], []) == []


@pytest.mark.parametrize("below", [0, 1])
def test_a_text_over_the_limit_is_missing_and_leaves_the_others_alone(
    below: int, model: ClassifierRewardModel, tiny_rewards: dict[str, Path], expected: list[float]
) -> None:
    lengths = [len(encode(model.tokenizer, PROMPT, answer)["input_ids"]) for answer in ANSWERS]
    limit = sorted(lengths)[12] - below  # that answer just fits, or is one token too long
    config = ClassifierReward(kind="classifier", model=str(tiny_rewards["helpful"]), max_length=limit, dtype="float32")
    scores = ClassifierRewardModel(config, on_gpu=False, num_threads=1).score([PROMPT] * len(ANSWERS), ANSWERS)
    assert {length > limit for length in lengths} == {True, False}
    for score, length, value in zip(scores, lengths, expected, strict=True):
        if length > limit:
            assert score == Score(None, f"{length} tokens exceed the model's limit of {limit}")
        else:
            assert score.value == pytest.approx(value, abs=1e-5)


def test_the_limit_of_the_model_holds_when_none_is_set(model: ClassifierRewardModel) -> None:
    short, long = model.score([PROMPT] * 2, ["fine", "hello " * 600])
    assert short.value is not None
    assert long.value is None
    assert long.missing.endswith("tokens exceed the model's limit of 512")


def split(lengths: list[int], budget: int, on_gpu: bool = False) -> list[list[int]]:
    """The batches of texts of these lengths, the shortest first."""
    batches: list[list[int]] = []

    def forward(batch: list[int]) -> list[float]:
        batches.append([lengths[i] for i in batch])
        return [0.0] * len(batch)

    TokenBatches(budget, None, on_gpu).score(lengths, forward)
    return batches


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(64, 600))
def test_batches_hold_every_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    lengths.sort()
    batches = split(lengths, budget)
    assert [length for batch in batches for length in batch] == lengths
    for batch in batches:
        # A single text may be longer than the budget; several together may not.
        assert len(batch) == 1 or max(batch) * len(batch) <= budget


def test_gpus_get_larger_batches_before_padding_counts() -> None:
    lengths = [100] * 30 + [130] * 30
    assert [len(batch) for batch in split(lengths, 16384)] == [30, 30]
    assert [len(batch) for batch in split(lengths, 16384, on_gpu=True)] == [60]


def test_batches_are_filled() -> None:
    assert split([10, 10, 25, 25, 90], 100) == [[10, 10, 25, 25], [90]]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=200))
def test_little_of_a_batch_is_padding(lengths: list[int]) -> None:
    batches = split(lengths, 8192)
    for batch, after in zip(batches, [*batches[1:], []], strict=True):
        padded = max(batch) * len(batch)
        assert padded <= 1024 or padded - sum(batch) <= 0.03 * padded
        if after:  # with one more, it would be too much
            longer = after[0] * (len(batch) + 1)
            assert longer > 8192 or (longer > 1024 and longer - sum(batch) - after[0] > 0.03 * longer)


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_memory_that_runs_out_makes_smaller_batches_which_grow_again(
    device: str, model: ClassifierRewardModel, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    forward, sizes, room = model._forward, [], [10**9]

    def limited(encoded: list[dict[str, list[int]]]) -> list[float]:
        padded = max(len(e["input_ids"]) for e in encoded) * len(encoded)
        if padded > room[0]:
            if device == "gpu":
                raise torch.OutOfMemoryError
            torch.empty(1 << 50)
        sizes.append(padded)
        return forward(encoded)

    monkeypatch.setattr(model, "_forward", limited)
    assert values(model, ANSWERS) == pytest.approx(expected, abs=1e-5)
    roomy = max(sizes)
    room[0], sizes[:] = 100, []
    lengths = [len(encode(model.tokenizer, PROMPT, answer)["input_ids"]) for answer in ANSWERS]
    scores = model.score([PROMPT] * len(ANSWERS), ANSWERS)
    for score, length, value in zip(scores, lengths, expected, strict=True):
        if length > 100:
            assert score == Score(None, f"out of memory for {length} tokens by themselves")
        else:
            assert score.value == pytest.approx(value, abs=1e-5)
    assert max(sizes) <= 100 < max(lengths)
    room[0], sizes[:] = 10**9, []
    assert values(model, ANSWERS * 3) == pytest.approx(expected * 3, abs=1e-5)
    assert max(sizes) >= roomy
    assert model._batches._tokens == model._batches._max_tokens


def test_another_error_of_the_network_is_no_want_of_memory(
    model: ClassifierRewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(encoded: list[dict[str, list[int]]]) -> list[float]:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(model, "_forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        model.score([PROMPT], ANSWERS[:1])


def test_a_reward_that_is_no_number_is_missing_for_its_row_alone(
    model: ClassifierRewardModel, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, odd = model._forward, encode(model.tokenizer, PROMPT, ANSWERS[3])

    def with_nan(encoded: list[dict[str, list[int]]]) -> list[float]:
        return [math.nan if e == odd else value for e, value in zip(encoded, forward(encoded), strict=True)]

    monkeypatch.setattr(model, "_forward", with_nan)
    scores = model.score([PROMPT] * len(ANSWERS), ANSWERS)
    assert scores[3] == Score(None, "score is nan")
    assert [s.value for i, s in enumerate(scores) if i != 3] == pytest.approx(expected[:3] + expected[4:], abs=1e-5)


def two_labels(tmp_path: Path, **options: Any) -> ClassifierRewardModel:
    folder = tmp_path / "two"
    if not folder.exists():
        make_llama(folder, seed=3, labels=2)
        config = json.loads((folder / "config.json").read_text())
        config["id2label"], config["label2id"] = {"0": "bad", "1": "good"}, {"bad": 0, "good": 1}
        (folder / "config.json").write_text(json.dumps(config))
    return ClassifierRewardModel(ClassifierReward(kind="classifier", model=str(folder), **options), on_gpu=False, num_threads=1)


def test_of_several_labels_one_is_chosen(tmp_path: Path) -> None:
    logits = [values(two_labels(tmp_path, label=label, label_score="logit"), ANSWERS) for label in (0, 1)]
    difference = [b - a for a, b in zip(*logits, strict=True)]  # type: ignore[operator]
    assert values(two_labels(tmp_path, label="good"), ANSWERS) == pytest.approx(difference, abs=1e-5)
    assert values(two_labels(tmp_path, label="bad"), ANSWERS) == pytest.approx([-d for d in difference], abs=1e-5)
    assert max(difference) - min(difference) > 0.1


def test_a_label_that_is_not_clear_is_an_error(tmp_path: Path, tiny_rewards: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"has 2 labels \(0: bad, 1: good\).*choose one with `label`"):
        two_labels(tmp_path)
    with pytest.raises(ModelError, match=r"label = 'best'.*0: bad, 1: good.*one of these"):
        two_labels(tmp_path, label="best")
    with pytest.raises(ModelError, match=r"label = 0.*no effect on one logit"):
        ClassifierRewardModel(
            ClassifierReward(kind="classifier", model=str(tiny_rewards["helpful"]), label=0), on_gpu=False, num_threads=1
        )
    with pytest.raises(ValueError, match="label_score has no effect without label"):
        ClassifierReward(kind="classifier", model="m", label_score="logit")


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle that nobody opens")
    with pytest.raises(ModelError, match=r"rewards\.helpful\.model.*no \.safetensors"):
        check_model("rewards.helpful.model", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    check_model("rewards.helpful.model", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/such/folder", ["model = '/no/such/folder'", "does not exist", "Hub id"]),
        ("./no/such/folder", ["does not exist"]),
        ("too/many/slashes", ["does not exist"]),
        ("embedded:nope", ["embedded:nope", "no such embedded model", "embedded:smollm2-135m"]),
        ("no-such-org/no-such-model", ["no-such-org/no-such-model", "Hub"]),
    ],
)
def test_a_model_that_cannot_be_found_is_named(name: str, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        check_model("model", name)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_config_json_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no config\.json.*check the path"):
        check_model("model", str(tmp_path))


def test_a_saved_model_is_found(tiny_policy: Path) -> None:
    check_model("model", str(tiny_policy))


def test_figures_count_texts_tokens_and_padding_since_loading(tiny_rewards: dict[str, Path]) -> None:
    config = ClassifierReward(kind="classifier", model=str(tiny_rewards["helpful"]), max_length=64, self_test=False)
    model = ClassifierRewardModel(config, on_gpu=False, num_threads=1)
    answers = ["a", "b" * 9, "c" * 300]  # the last one is too long
    lengths = [len(encode(model.tokenizer, PROMPT, answer)["input_ids"]) for answer in answers[:2]]
    for times in (1, 2):
        model.score([PROMPT] * 3, answers)
        figures = model.figures()
        assert figures["num_texts"] == 2 * times
        assert figures["num_tokens"] == sum(lengths) * times
        assert figures["num_padded_tokens"] == 2 * max(lengths) * times
