"""Chat messages to prompt token ids: the template is applied once, and vLLM gets ids, never text.

Sending templated text lets the engine's tokenizer add a second BOS; ids cannot be changed on the way.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rc_ray.core.ids import Message
from rc_ray.errors import ModelError


class PromptRenderer:
    """Renders messages with the policy's own tokenizer and chat template.

    Args:
        model: Hub id or local folder.
        adapter: folder of a LoRA adapter, whose own tokenizer and template count where it has them.
    """

    def __init__(
        self, model: str, revision: str | None = None, trust_remote_code: bool = False, adapter: str | None = None
    ) -> None:
        from transformers import AutoTokenizer

        if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
            model, revision = adapter, None
        self.tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"model = {model!r}: its tokenizer has no chat template, so messages cannot be rendered; use an instruction-tuned "
                "model, or save a chat_template with the tokenizer"
            )

    def __call__(self, messages: list[Message]) -> list[int]:
        """Token ids up to and including the marker where the assistant's answer begins."""
        ids: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [int(i) for i in ids]


def template_hash(tokenizer: Any) -> str:
    """What decides on the tokens of a conversation: the chat template and the vocabulary."""
    content = json.dumps([tokenizer.chat_template, sorted(tokenizer.get_vocab().items())])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
