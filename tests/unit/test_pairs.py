"""Pairs as tokens: equal to what TRL makes of them, and every problem found that TRL would train on."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.config import TrainingConfig
from rc_ray.errors import ConfigError, DataError
from rc_ray.generation.render import template_hash
from rc_ray.ledger.storage import Folder
from rc_ray.training.arguments import LOSSES, check_training, dpo_arguments, is_a
from rc_ray.training.pairs import PairCounts, PairTokenizer, end_tokens
from tests.conftest import CHAT_TEMPLATE, make_tokenizer

BOS_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE


def pair(chosen: str = "hello", rejected: str = "world", prompt: str = "how are you?") -> dict[str, Any]:
    return {
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def look(
    rows: list[Any], template: str = CHAT_TEMPLATE, max_length: int | None = None, bos: bool = False
) -> tuple[list[Any], PairCounts]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    if bos:  # writes it before other texts, as Llama's does
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PairTokenizer(tokenizer, frozenset([tokenizer.eos_token_id]), max_length).tokenize(rows)


def test_tokens_are_those_that_trl_makes(tiny_policy: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [pair("hello " * i, "world", f"question {i}") for i in range(1, 6)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    trainer = DPOTrainer(
        model=str(tiny_policy),
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    kept, counts = PairTokenizer(tokenizer, end_tokens(str(tiny_policy), tokenizer), None).tokenize(rows)
    assert counts.num_pairs == len(kept) == 5
    for own, theirs in zip(kept, trainer.train_dataset, strict=True):
        assert {key: own[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} == {
            key: theirs[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")
        }
    assert counts.longest == max(len(t["prompt_ids"]) + len(t["chosen_ids"]) for t in trainer.train_dataset)


@pytest.mark.parametrize(
    ("problem", "rows", "options"),
    [
        ("equal_answers", [pair("same", "same")], {}),
        ("double_bos", [pair()], {"template": "<s>" + BOS_TEMPLATE, "bos": True}),
        ("missing_bos", [pair()], {"bos": True}),
        ("missing_eos", [pair()], {"template": CHAT_TEMPLATE.replace("</s>", "")}),
        # Renders the number of messages, so a prompt is not the beginning of prompt and answer.
        ("prompt_not_prefix", [pair()], {"template": "{{ messages|length }}" + CHAT_TEMPLATE}),
        ("too_long", [pair("hello " * 40)], {"max_length": 60}),
        ("malformed", [{"prompt": "text", "chosen": "text", "rejected": "text"}], {}),
    ],
)
def test_each_problem_is_found_and_said(problem: str, rows: list[Any], options: dict[str, Any]) -> None:
    kept, counts = look(rows, **options)
    assert kept == []
    assert counts.problems == {problem: 1}
    with pytest.raises(DataError, match=rf"1 x {problem}: pair 0 "):
        counts.check("pairs", options.get("max_length"), 0.0)


@pytest.mark.parametrize(
    "options",
    [{}, {"template": BOS_TEMPLATE, "bos": True}, {"template": CHAT_TEMPLATE.replace("</s>", "</s>\n")}],
)
def test_good_pairs_pass(options: dict[str, Any]) -> None:
    kept, counts = look([pair(), pair("are", "you")], **options)
    assert [row["row"] for row in kept] == [0, 1]
    counts.check("pairs", None, 0.0)


def test_pairs_that_are_too_long_are_left_out_up_to_a_share() -> None:
    kept, counts = look([pair("hello " * 40), *[pair()] * 3], max_length=60)
    assert [row["row"] for row in kept] == [1, 2, 3]
    counts.check("pairs", 60, 0.25)
    with pytest.raises(DataError, match=r"1 x too_long.*max_length = 60.*max_too_long_fraction = 0\.2"):
        counts.check("pairs", 60, 0.2)


def test_a_template_that_refuses_a_system_message_is_one_of_the_problems() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    rows = [pair(), pair()]
    del rows[1]["prompt"][0]
    kept, counts = look(rows, refusing)
    assert [row["row"] for row in kept] == [1]
    assert counts.problems == {"malformed": 1}


def test_a_line_break_after_the_end_may_be_several_tokens() -> None:
    """As of SentencePiece, which puts a space before it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE

    class Spaced:
        def __call__(self, text: str, **options: Any) -> Any:
            found = tokenizer(text, **options)
            return {"input_ids": [9998, 9999]} if text == "\n" else found

        def apply_chat_template(self, *arguments: Any, **options: Any) -> list[int]:
            ids = list(tokenizer.apply_chat_template(*arguments, **options))
            return ids if options["add_generation_prompt"] else [*ids, 9999]

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    counts = PairTokenizer(Spaced(), frozenset([tokenizer.eos_token_id]), None).tokenize([pair()])[1]
    assert not counts.problems


def test_counts_of_parts_add_up() -> None:
    whole, first, second = PairCounts(), look([pair("same", "same"), pair()])[1], look([pair("hello " * 9), pair("a", "a")])[1]
    for part in (first, second):
        whole.add(part)
    assert (whole.num_pairs, whole.problems["equal_answers"], whole.longest) == (4, 2, second.longest)
    assert whole.num_tokens == first.num_tokens + second.num_tokens
    assert whole.examples == {"equal_answers": "pair 0"}
    with pytest.raises(DataError, match="there is no pair"):
        PairCounts().check("pairs", None, 0.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trl": {"label_smothing": 0.1}}, "no such field; did you mean 'label_smoothing'"),
        ({"trl": {"beta": 0.2}}, r"is set by training\.beta"),
        ({"trl": {"adam_epsilon": "1e-8"}}, r"adam_epsilon = '1e-8': must be float, .*write 1\.0e-8"),
        ({"trl": {"dataloader_num_workers": 1.5}}, "must be int, as TRL"),
        ({"trl": {"ld_alpha": 0.5}}, "only sums are kept"),
        ({"trl": {"dataloader_drop_last": True}}, "would leave pairs out"),
        ({"trl": {"label_smoothing": 0.1}}, r"label_smoothing = 0.1: has no effect on .*\['sigmoid'\]; choose one of robust"),
        ({"loss_type": "exo_pair"}, r"exo_pair: needs training\.trl\.label_smoothing above 0"),
        ({"trl": {"discopop_tau": 0.1}}, "choose one of discopop"),
        ({"trl": {"f_divergence_type": "kl"}}, "TRL has reverse_kl, forward_kl"),
        ({"trl": {"f_divergence_type": "forward_kl"}, "loss_type": "nca_pair"}, "is for training.loss_type sigmoid"),
        ({"trl": {"f_alpha_divergence_coef": 0.5}}, "no effect without f_divergence_type: alpha_divergence"),
        ({"trl": {"use_weighting": True}, "loss_type": "aot"}, "not for the losses aot"),
        ({"trl": {"eval_strategy": "steps"}}, "needs pairs that are not trained on"),
        ({"trl": {"logging_nan_inf_filter": True}}, "a loss that is no number ends the training"),
        ({"recipe": "mix", "trl": {"label_smoothing": 0.1}}, r"no effect on training\.recipe = mix"),
        ({"loss_type": "sigmod"}, "no such loss; did you mean 'sigmoid'"),
        ({"loss_type": ["sigmoid", "sft"], "trl": {"loss_weights": [1.0]}}, "a number for each of"),
        ({"report_to": ["mlflow"]}, "`pip install mlflow`"),
        ({"lora_rank": 4, "quantization": "4bit"}, "needs GPUs"),
    ],
)
def test_what_other_libraries_must_know_is_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_training(TrainingConfig(**given), on_gpu=False)


def test_all_losses_of_trl_are_known() -> None:
    import inspect

    from trl import DPOTrainer

    found = re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer))
    assert set(found) == set(LOSSES)


def test_all_fields_of_trl_are_known() -> None:
    from dataclasses import MISSING, fields

    from trl import DPOConfig

    known = {field.name: field.default for field in fields(DPOConfig) if field.init and not field.name.startswith("_")}
    assert known.keys() <= dpo_arguments().keys()
    refused = [name for name, value in known.items() if value is not MISSING and not is_a(value, dpo_arguments()[name])]
    assert refused == []
    check_training(
        TrainingConfig(trl={"lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "optim": "adamw_torch"}), on_gpu=False
    )


def test_pairs_of_another_template_are_refused_where_that_is_known() -> None:
    tokenizer, other = make_tokenizer(), make_tokenizer()
    tokenizer.chat_template, other.chat_template = CHAT_TEMPLATE, CHAT_TEMPLATE + " "
    own, theirs = template_hash(tokenizer), template_hash(other)
    rows = [pair() | {"templates": templates} for templates in ([own], [theirs], [theirs, own], [], None)]
    for template, expected in ((own, {"template_mismatch": 1}), (None, {})):
        kept, counts = PairTokenizer(tokenizer, frozenset([tokenizer.eos_token_id]), None, template).tokenize(rows)
        assert dict(counts.problems) == expected
        assert len(kept) == 5 - sum(expected.values())
    counts = PairTokenizer(tokenizer, frozenset([tokenizer.eos_token_id]), None, own).tokenize(rows)[1]
    with pytest.raises(DataError, match=r"1 x template_mismatch: pair 1 .* training\.allow_other_template"):
        counts.check("pairs", None, 0.0)


def test_only_several_workers_need_pairs_twice() -> None:
    from rc_ray.training.dpo import _facts

    counts = PairCounts(num_pairs=22)
    batches = {"global_batch_size": 4, "per_device_batch_size": 2}
    assert _facts(TrainingConfig(num_workers=1, **batches), counts).repeated == 0
    assert _facts(TrainingConfig(num_workers=2, **batches), counts).repeated == 2


def test_a_schedule_of_the_user_takes_the_place_of_the_usual_one(tmp_path: Path) -> None:
    from rc_ray.training.dpo import dpo_config

    found = []
    for trl in ({}, {"lr_scheduler_type": "cosine"}):
        task = SimpleNamespace(
            training=TrainingConfig(trl=trl, report_to=[]),
            steps=4,
            max_length=64,
            on_gpu=False,
            seed=0,
            output=Folder.at(tmp_path),
        )
        found.append(dpo_config(task, SimpleNamespace(shared=tmp_path, world=1)).lr_scheduler_type)
    assert found == ["linear", "cosine"]


def test_a_file_is_read_once_for_slices_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rc_ray.training import reference

    pairs = Folder.at(tmp_path)
    for number in range(2):
        pq.write_table(pa.Table.from_pylist([pair()] * 200), tmp_path / f"{number}.parquet")
    read, read_table = [], Folder.read_table
    monkeypatch.setattr(Folder, "read_table", lambda self, name: (read.append(name), read_table(self, name))[1])
    actor = reference.ReadPairs(SimpleNamespace(pairs=pairs))
    slices = reference.slices(pairs)
    assert [reference.read_slice(actor._file, part).num_rows for part in slices] == [64] * 6 + [16]
    assert read == ["0.parquet", "1.parquet"]
