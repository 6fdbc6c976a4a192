"""What a reward model must pass before its rewards are used: each is a defect that reward models have had, and that nobody notices.

* It begins a text with one beginning-of-sequence token, where its tokenizer has one. (Templates may begin every turn with it.)
* The text it reads ends where the answer ends: not before, and with no header of another turn after.
* The padding token of a classifier ends no text; a model that takes the last token that is no padding would read the one before. In a text it may occur where the
  network is one of transformers, which looks from the right; others may look from the left.
* An answer has the same reward by itself, in a padded batch, and in another order.

Of implicit rewards both models are asked, for the log-probs of answers; no padding is looked at by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rc_ray.core.ids import Message
from rc_ray.errors import ModelError
from rc_ray.rewards.encoding import encode

if TYPE_CHECKING:
    from rc_ray.rewards.base import Score
    from rc_ray.rewards.classifier import Classifier
    from rc_ray.rewards.language_model import LanguageModel

PROMPT: list[Message] = [{"role": "user", "content": "How much is two and two?"}]
ANSWERS = [
    "Four.",
    "Two and two make four, " + "as they always have, " * 8 + "I think.",
    "That is five, or four; I am not sure.",
]
# Largest difference between two ways of asking, relative to the larger of 1 and the reward.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
TURN_OFF = "; if this is how it was trained, set `self_test: false` for it"


def self_test(model: Classifier, name: str) -> None:
    """Runs all checks on a loaded model.

    Raises:
        ModelError: which one failed, and how.
    """
    wrong = (
        wrong_texts(model.tokenizer) or _padding_is_no_text(model) or _same_in_any_company(model.score, model.dtype, "reward")
    )
    if wrong:
        raise ModelError(f"reward model {name!r} failed its self-test: {wrong}{TURN_OFF}")


def self_test_implicit(models: dict[str, LanguageModel], dtype: str, name: str) -> None:
    """Runs the checks on the models of an implicit reward, under their names in the configuration.

    Raises:
        ModelError: which one failed, and how.
    """
    for side, model in models.items():
        wrong = wrong_texts(model.tokenizer) or _same_in_any_company(model.logprobs, dtype, "log-prob")
        if wrong:
            raise ModelError(f"the implicit reward of {name!r} failed its self-test: {side}: {wrong}{TURN_OFF}")


def wrong_texts(tokenizer: Any) -> str | None:
    """What is wrong with the texts that a tokenizer makes of prompts and answers, or None."""
    return _one_beginning(tokenizer) or _ends_with_the_answer(tokenizer)


def padding_at_the_end(tokenizer: Any, pad_token_id: int | None) -> str | None:
    """The padding token if texts end with it, or None."""
    return str(tokenizer.convert_ids_to_tokens(pad_token_id)) if pad_token_id in _ids(tokenizer, ANSWERS[0])[-1:] else None


def _ids(tokenizer: Any, answer: str) -> list[int]:
    return encode(tokenizer, PROMPT, answer)["input_ids"]


def _one_beginning(tokenizer: Any) -> str | None:
    begin = tokenizer.bos_token_id
    if begin is None:
        return None
    ids = _ids(tokenizer, ANSWERS[0])
    count = next((i for i, each in enumerate(ids) if each != begin), len(ids))
    if count > 1:
        return f"its texts begin with {count} tokens {tokenizer.bos_token!r}; take all but one out of its chat template"
    if count == 0 and tokenizer("a")["input_ids"][0] == begin:
        return f"its tokenizer begins texts with {tokenizer.bos_token!r}, but its chat template does not"
    return None


def _ends_with_the_answer(tokenizer: Any) -> str | None:
    first, second = (
        _ids(tokenizer, f"This is a somewhat longer answer, which ends with the word {word}") for word in ("red", "blue")
    )
    if first == second:
        return "two answers that differ in their last word look the same to it, so it does not read answers to their end"
    if not tokenizer.chat_template:
        return None
    answer = "answer"
    text = str(tokenizer.apply_chat_template([*PROMPT, {"role": "assistant", "content": answer}], tokenize=False))
    before, found, after = text.rpartition(answer)
    header = before.rpartition(PROMPT[-1]["content"])[2].strip()
    if not found or (header and header in after):
        return f"after the answer its chat template writes {after!r}, which begins another turn"
    return None


def _padding_is_no_text(model: Classifier) -> str | None:
    padding, ids = model.pad_token_id, _ids(model.tokenizer, ANSWERS[0])
    if padding is None or padding not in (ids[-1:] if model.looks_from_the_right else ids):
        return None
    token = model.tokenizer.convert_ids_to_tokens(padding)
    return f"its padding token {token!r} also occurs in its texts, so the position it reads is not their end; give it another pad_token"


def _same_in_any_company(score: Callable[[list[list[Message]], list[str]], list[Score]], dtype: str, what: str) -> str | None:
    def ask(answers: list[str]) -> list[Score]:
        return score([PROMPT] * len(answers), answers)

    alone = [ask([answer])[0] for answer in ANSWERS]
    for company, values in (("in a padded batch", ask(ANSWERS)), ("in another order", ask(ANSWERS[::-1])[::-1])):
        for one, other in zip(alone, values, strict=True):
            # A text that is longer than the model's limit has none either way.
            found = [
                f"the {what} {each.value:.6g}" if each.value is not None else f"no {what} ({each.missing})"
                for each in (one, other)
            ]
            if one.value is None or other.value is None:
                differs = one.value is not other.value
            else:
                differs = abs(one.value - other.value) > TOLERANCE[dtype] * max(1.0, abs(one.value))
            if differs:
                return f"an answer has {found[0]} by itself and {found[1]} {company} ({dtype}, tolerance {TOLERANCE[dtype]:g})"
    return None
