"""How a reward model reads a prompt and an answer: with its own tokenizer and its own template, never the policy's.

* Models with a chat template get the whole conversation through it.
* Others (encoders such as MiniLM) get a text pair: the conversation without system messages, and the answer.

Used for training and for scoring alike, so a model is always asked in the form it learned.
"""

from __future__ import annotations

from typing import Any

from rc_ray.core.ids import Message


def encode(tokenizer: Any, messages: list[Message], answer: str, max_length: int | None = None) -> dict[str, list[int]]:
    """Token ids (and token types where the model has them) of one conversation.

    Args:
        tokenizer: the reward model's own.
        messages: the conversation before the answer.
        answer: the answer to judge, never shortened here.
        max_length: None keeps everything. Otherwise the oldest tokens of the prompt are left out to fit; only training does
            so, and only the pair form supports it.
    """
    if tokenizer.chat_template:
        conversation = [*messages, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"{len(ids)} tokens exceed {max_length}")
        return {"input_ids": list(ids), "attention_mask": [1] * len(ids)}
    turns = [m for m in messages if m["role"] != "system"]
    prompt = turns[0]["content"] if len(turns) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in turns)
    if max_length is None:
        encoded = tokenizer(prompt, answer)
    else:
        tokenizer.truncation_side = "left"
        encoded = tokenizer(prompt, answer, truncation="only_first", max_length=max_length)
    return {key: list(encoded[key]) for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded}


def set_padding(tokenizer: Any, model_config: Any) -> None:
    """Gives a tokenizer and a model without a padding token one.

    Padding is masked in attention, but a model that takes the last token finds it as the last one that is no padding, so the token should not
    be one that ends a text; where there is no other, the self-test of rewards looks whether it does.
    """
    if tokenizer.pad_token_id is None:
        names = tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token
        known = [name for name in names if name is not None]
        tokenizer.pad_token = next((name for name in known if name != tokenizer.eos_token), tokenizer.eos_token)
    if model_config.pad_token_id is None:
        model_config.pad_token_id = tokenizer.pad_token_id
