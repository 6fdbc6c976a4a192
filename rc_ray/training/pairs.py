"""Preference pairs as token ids, as TRL makes them, and everything that can be wrong with them before any step.

TRL trains on a doubled beginning, an answer without an end, a prompt that the template renders differently with an answer, and cuts what is too
long; here each is found and named. Invariant: a pair is either trained on whole, or counted as left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from rc_ray.core.ids import Message
from rc_ray.errors import DataError

SIDES = ("chosen", "rejected")
# What is wrong, and what to do about it.
PROBLEMS = {
    "malformed": "is no pair of message lists; give prompt, chosen and rejected as lists of {role, content}",
    "equal_answers": "has equal chosen and rejected answers, from which nothing can be learned; leave it out",
    "double_bos": "begins with more than one beginning-of-sequence token; take all but one out of the chat template",
    "missing_bos": "does not begin with the beginning-of-sequence token, which the tokenizer writes before other texts; add it to the chat template",
    "prompt_not_prefix": "has a prompt whose tokens are not the beginning of prompt and answer, so the policy would learn after a text that it never "
    "sees when it answers; use a chat template that renders a prompt the same way with and without an answer",
    "missing_eos": "has an answer without an end-of-sequence token after it, so the policy would learn never to stop; use a chat template that writes it",
    "template_mismatch": "was sampled with another tokenizer or chat template than this model's; train the model that it was sampled with, or allow it with "
    "training.allow_other_template: true",
    "too_long": "is longer than training.max_length",
}


@dataclass
class PairCounts:
    """What a look at all pairs found."""

    num_pairs: int = 0
    longest: int = 0
    """Tokens of prompt and answer, of pairs that fit."""
    num_tokens: int = 0
    """Of prompts and answers, of pairs that fit."""
    num_read_tokens: int = 0
    """That the reference has read; 0 where all log-probs were there."""
    num_padded_tokens: int = 0
    """The same with padding."""
    problems: Counter[str] = field(default_factory=Counter)
    """Pairs by what is wrong with them."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first pair of each problem."""
    rewards: dict[str, list[float]] = field(default_factory=dict)
    """Smallest and largest reward of each objective, where pairs have rewards."""
    digest: int = 0
    """Of the content and place of all pairs, whatever the order in which they are counted; by a look at them, and 0 by the reference pass."""

    def add(self, other: PairCounts) -> None:
        """Takes in those of later pairs."""
        self.num_pairs += other.num_pairs
        self.longest = max(self.longest, other.longest)
        self.num_tokens += other.num_tokens
        self.num_read_tokens += other.num_read_tokens
        self.num_padded_tokens += other.num_padded_tokens
        self.problems.update(other.problems)
        self.examples = {**other.examples, **self.examples}
        self.digest = (self.digest + other.digest) % (1 << 128)
        for name, (low, high) in other.rewards.items():
            known = self.rewards.get(name, [low, high])
            self.rewards[name] = [min(known[0], low), max(known[1], high)]

    def check(self, where: str, max_length: int | None, max_too_long: float) -> None:
        """Refuses pairs that TRL would train on wrongly.

        Args:
            where: the pairs' place, for messages.
            max_too_long: share of pairs that may be left out because they are longer than `max_length`.

        Raises:
            DataError: with every problem, how many pairs have it, and the first of them.
        """
        if not self.num_pairs:
            raise DataError(f"pairs = {where!r}: there is no pair to train on; see drops/ for the reasons")
        too_long = self.problems["too_long"]
        wrong = [name for name in PROBLEMS if self.problems[name] and name != "too_long"]
        lines = [f"  {self.problems[name]} x {name}: {self.examples[name]} {PROBLEMS[name]}" for name in wrong]
        if too_long > max_too_long * self.num_pairs:
            lines.append(
                f"  {too_long} x too_long: {self.examples['too_long']} {PROBLEMS['too_long']} = {max_length}, and more than "
                f"training.max_too_long_fraction = {max_too_long:g} of all pairs would be left out; raise max_length (leave it out to fit the longest), or that share"
            )
        if lines:
            raise DataError(f"pairs = {where!r}: of {self.num_pairs} pairs\n" + "\n".join(lines))
        if too_long == self.num_pairs:
            raise DataError(f"training.max_length = {max_length}: every pair in {where!r} is longer; raise it")


class PairTokenizer:
    """Tokenizes pairs with the policy's template, as `trl.DPOTrainer` does.

    Args:
        tokenizer: of the policy.
        end_ids: tokens that end an answer, `end_tokens`.
        max_length: most tokens of prompt and answer; None: no limit.
        template: `template_hash` of the tokenizer, for pairs of which it is known what they were sampled with; None: anything goes.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], max_length: int | None, template: str | None = None) -> None:
        self._tokenizer, self._end_ids, self._max_length, self._template = tokenizer, end_ids, max_length, template
        self._writes_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        blank = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("\n", " ", "\n\n"))
        self._blank = frozenset(token for ids in blank for token in ids) - end_ids  # some write a space before a line break

    def vocabulary(self) -> dict[str, int]:
        """Ids of the policy's tokens."""
        return dict(self._tokenizer.get_vocab())

    def tokenize(self, rows: Iterable[dict[str, Any]], first: int = 0) -> tuple[list[dict[str, Any]], PairCounts]:
        """The pairs that can be trained on, as {row, prompt_ids, chosen_ids, rejected_ids}, and counts of all.

        Args:
            rows: with prompt, chosen, rejected as message lists, and `templates` that they were sampled with, where these are known.
            first: number of the first row, for messages.
        """
        kept, counts = [], PairCounts()
        for number, row in enumerate(rows, first):
            counts.num_pairs += 1
            try:
                ids = self._ids(row)
                problem = self._problem(row, ids)
            except (TypeError, KeyError, IndexError, AttributeError, ValueError, TemplateError):
                ids, problem = {}, "malformed"
            if problem:
                counts.problems[problem] += 1
                counts.examples.setdefault(problem, f"pair {number}")
                continue
            lengths = [len(ids["prompt_ids"]) + len(ids[f"{side}_ids"]) for side in SIDES]
            counts.longest = max(counts.longest, *lengths)
            counts.num_tokens += sum(lengths)
            rewards = [row.get(f"rewards_{side}") or {} for side in SIDES]
            names = sorted(rewards[0])
            for name in names:
                values = [side[name] for side in rewards]
                counts.add(PairCounts(rewards={name: [min(values), max(values)]}))
            kept.append({"row": number, **ids, "differences": [rewards[0][name] - rewards[1][name] for name in names]})
        return kept, counts

    def _ids(self, row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = self._render(row["prompt"], True)
        whole = {side: self._render([*row["prompt"], *row[side]], False) for side in SIDES}
        shared = min(_common_prefix(prompt, ids) for ids in whole.values())
        return {
            "prompt_ids": prompt[:shared],
            **{f"{side}_ids": ids[shared:] for side, ids in whole.items()},
            "unshared": prompt[shared:],
        }

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        found = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
        return [int(i) for i in found]

    def _problem(self, row: dict[str, Any], ids: dict[str, list[int]]) -> str | None:
        """The first of `PROBLEMS` that a pair has."""
        unshared, bos = ids.pop("unshared"), self._tokenizer.bos_token_id
        if [m["content"] for m in row["chosen"]] == [m["content"] for m in row["rejected"]]:
            return "equal_answers"
        if bos is not None and ids["prompt_ids"][:2] == [bos, bos]:
            return "double_bos"
        if self._writes_bos and ids["prompt_ids"][:1] != [bos]:
            return "missing_bos"
        if unshared:
            return "prompt_not_prefix"
        if not all(self._ends(ids[f"{side}_ids"]) for side in SIDES):
            return "missing_eos"
        if row.get("templates") and self._template not in (None, *row["templates"]):
            return "template_mismatch"
        longest = len(ids["prompt_ids"]) + max(len(ids[f"{side}_ids"]) for side in SIDES)
        return "too_long" if self._max_length is not None and longest > self._max_length else None

    def _ends(self, answer: list[int]) -> bool:
        """Whether the last token is one that ends an answer; some templates write a line break after it."""
        last = next((token for token in reversed(answer) if token not in self._blank), None)
        return last in self._end_ids


def end_tokens(path: str, tokenizer: Any, revision: str | None = None) -> frozenset[int]:
    """Tokens at which generation stops: the tokenizer's and those of the model's generation settings."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    except OSError:  # it has none
        found = None
    more = found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in [tokenizer.eos_token_id, *more] if token is not None)


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
