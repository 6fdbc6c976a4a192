"""How a reward model reads a prompt and an answer: with its own tokenizer and its own template, never the policy's.

* Models with a chat template get the whole conversation through it.
* Others (encoders such as MiniLM) get a text pair: the conversation without system messages, and the answer.

Used for training and for scoring alike, so a model is always asked in the form it learned. A text that is cut is cut in the tokens of its
messages: what the template or the tokenizer writes around them stays.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from rc_ray.core.ids import Message

Side = Literal["prompt_start", "answer_end"]


def encode(
    tokenizer: Any, messages: list[Message], answer: str, max_length: int | None = None, side: Side = "prompt_start"
) -> dict[str, list[int]]:
    """Token ids (and token types where the model has them) of one conversation.

    Args:
        tokenizer: the reward model's own.
        messages: the conversation before the answer.
        answer: the answer to judge.
        max_length: None keeps everything. Otherwise tokens are left out to fit.
        side: which tokens: the first ones of the conversation, or the last ones of the answer.

    Raises:
        ValueError: a text that is too long would lose its whole prompt, or its whole answer, or cannot be cut.
    """
    conversation = [*messages, {"role": "assistant", "content": answer}]
    if tokenizer.chat_template:
        ids = list(tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False))
        encoded = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    else:
        turns = [m for m in messages if m["role"] != "system"]
        prompt = turns[0]["content"] if len(turns) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in turns)
        pair = tokenizer(prompt, answer)
        # A slow tokenizer does not say which token is whose; there nothing can be cut, and no beginning is written twice.
        parts = pair.sequence_ids(0) if tokenizer.is_fast else [0] * len(pair["input_ids"])
        begin = tokenizer.bos_token_id
        # Llama's writes its beginning before the second part, too.
        again = begin is not None and begin not in (tokenizer.eos_token_id, tokenizer.sep_token_id)
        kept = [i for i, token in enumerate(pair["input_ids"]) if not (again and i and token == begin and parts[i] is None)]
        names = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in pair]
        encoded = {key: [pair[key][i] for i in kept] for key in names}
    length = len(encoded["input_ids"])
    if max_length is None or length <= max_length:
        return encoded
    if not tokenizer.is_fast:
        raise ValueError(f"{length} tokens exceed {max_length}, and its tokenizer does not say which token is where")
    surplus = length - max_length
    if tokenizer.chat_template:
        found = _of_messages(tokenizer, conversation, encoded["input_ids"], side)
    else:
        wanted = 0 if side == "prompt_start" else 1
        found = [number for number, i in enumerate(kept) if parts[i] == wanted]
    if surplus >= len(found):
        what = "prompt" if side == "prompt_start" else "answer"
        raise ValueError(f"{length} tokens exceed {max_length}, and the {what} has only {len(found)} of them")
    gone = set(found[:surplus] if side == "prompt_start" else found[-surplus:])
    return {key: [value for i, value in enumerate(values) if i not in gone] for key, values in encoded.items()}


def _of_messages(tokenizer: Any, conversation: list[Message], ids: list[int], side: Side) -> list[int]:
    """Positions of the tokens that lie wholly in the messages before the answer, or in the answer, rather than in what the template writes.

    The template is asked once more with a mark in the place of each message, which shows where it puts them.

    Raises:
        ValueError: it does not put them down as they are.
    """

    def render(contents: list[str]) -> str:
        turns = [{**m, "content": content} for m, content in zip(conversation, contents, strict=True)]
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    contents = [m["content"] for m in conversation]
    text = render(contents)
    parts = re.split("\ue000(\\d+)\ue001", render([f"\ue000{i}\ue001" for i in range(len(contents))]))
    for each in (contents, [content.strip() for content in contents]):
        built, spans = "", []
        for number, part in enumerate(parts):
            start = len(built)
            built += each[int(part)] if number % 2 else part
            if number % 2 and (int(part) == len(contents) - 1) == (side == "answer_end"):
                spans.append((start, len(built)))
        if built == text:
            break
    else:
        raise ValueError("its chat template changes messages, so there is no telling which tokens are theirs")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded["input_ids"]) != ids:
        raise ValueError(
            "its tokenizer reads the template's text in another way, so there is no telling which tokens are whose"
        )
    return [i for i, (start, end) in enumerate(encoded["offset_mapping"]) if any(a <= start < b and end <= b for a, b in spans)]


def set_padding(tokenizer: Any, model_config: Any) -> None:
    """Gives a tokenizer and a model without a padding token one.

    Padding is masked in attention, but a model that takes the last token finds it as the last one that is no padding, so the token should not
    be one that ends a text; where there is no other, the self-test of rewards looks whether it does.
    """
    text_config = model_config.get_text_config()  # itself, unless a model is of more than text
    if tokenizer.pad_token_id is None and text_config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text_config.pad_token_id)
    if tokenizer.pad_token_id is None:
        names = tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token
        known = [name for name in names if name is not None]
        tokenizer.pad_token = next((name for name in known if name != tokenizer.eos_token), tokenizer.eos_token)
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    if getattr(model_config, "pad_token_id", None) is None:
        model_config.pad_token_id = text_config.pad_token_id
