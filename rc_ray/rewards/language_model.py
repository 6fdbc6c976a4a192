"""Log-probs of answers under a causal language model, run with plain transformers: for implicit rewards, and as DPO's reference.

Invariant: a log-prob does not depend on its batch beyond rounding; an answer that the model cannot read in full has none.
"""

from __future__ import annotations

from typing import Any

from rc_ray.core.ids import Message
from rc_ray.errors import ModelError
from rc_ray.models.resolve import local_model
from rc_ray.rewards.base import Score
from rc_ray.rewards.batches import TokenBatches, length_limit


class LanguageModel:
    """Log-probs of answers under one causal language model.

    Raises:
        ModelError: it has no chat template.
    """

    def __init__(
        self, name: str, revision: str | None, trust_remote_code: bool, dtype: str, on_gpu: bool, max_batch_tokens: int,
        max_length: int | None = None,
    ) -> None:  # fmt: skip
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._device = "cuda" if on_gpu else "cpu"
        path = local_model(name)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"model {name!r} has no chat template, so there is no telling how it reads an answer; save one with its tokenizer"
            )
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), use_safetensors=True, **options)
        self._model.to(self._device).eval()
        limit = length_limit(self.tokenizer, self._model.config, max_length)
        self.batches = TokenBatches(max_batch_tokens, limit, on_gpu)

    def vocabulary(self) -> dict[str, int]:
        """Ids of the tokens that it reads."""
        return dict(self.tokenizer.get_vocab())

    def logprobs(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """log p(answer | prompt) of each, in nats."""
        texts, starts = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            texts.append(self._ids([*prompt, {"role": "assistant", "content": answer}], False))
            before = self._ids(prompt, True)
            starts.append(
                len(before) if texts[-1][: len(before)] == before else self._merged(prompt, answer, texts[-1], before)
            )
        known = [i for i, start in enumerate(starts) if start is not None]
        values = self.sums([texts[i] for i in known], [starts[i] or 0 for i in known])
        scores = [Score(None, "its chat template renders the conversation differently with and without an answer")] * len(texts)
        for i, score in zip(known, values, strict=True):
            scores[i] = score
        return scores

    def sums(self, texts: list[list[int]], starts: list[int]) -> list[Score]:
        """Sum of the log-probs of the tokens from `starts[i]` to the end of each text, in nats."""
        return self.batches.score(
            [len(text) for text in texts], lambda batch: self._forward([texts[i] for i in batch], [starts[i] for i in batch])
        )

    def _merged(self, prompt: list[Message], answer: str, text: list[int], before: list[int]) -> int | None:
        """Where the answer begins if its first token also holds the end of the prompt (a line break, say); None if the prompt is another one."""
        whole, start = (
            str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=add, tokenize=False))
            for messages, add in (([*prompt, {"role": "assistant", "content": answer}], False), (prompt, True))
        )
        if not whole.startswith(start):
            return None
        return next((i for i, (one, other) in enumerate(zip(text, before, strict=False)) if one != other), None)

    def _ids(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        found = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
        return list(found)

    def _forward(self, texts: list[list[int]], starts: list[int]) -> list[float]:
        """Sum of the log-probs from `starts[i]` to the end of each text."""
        torch = self._torch
        # To the right of a text a causal model's padding touches nothing.
        shape = len(texts), max(map(len, texts))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        with torch.inference_mode():
            logits = self._model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            tokens = logits.gather(2, ids[:, 1:, None])[:, :, 0] - logits.logsumexp(dim=2)
            position = torch.arange(1, shape[1], device=self._device)[None]
            counted = (position >= torch.tensor(starts, device=self._device)[:, None]) & (mask[:, 1:] == 1)
            return list((tokens * counted).sum(dim=1).cpu().tolist())
