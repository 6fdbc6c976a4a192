"""Trains a reward model: a sequence classifier with one logit, on preference pairs, by the Bradley–Terry likelihood.

    loss = mean of −log σ(r(prompt, chosen) − r(prompt, rejected))          (Bradley & Terry 1952; arXiv 2203.02155, eq. 1)

The result is a plain `AutoModelForSequenceClassification` folder, with its held-out accuracy in `reward_training.json`.
Invariant: a prompt is either in the training or in the held-out part; what had to be cut or left out is counted and printed.

    rc-ray train-reward --pairs embedded:helpful --output embedded:reward-helpful
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rc_ray.core.ids import canonical_json, prompt_id
from rc_ray.core.statistics import wilson_interval
from rc_ray.errors import ConfigError, DataError
from rc_ray.ledger.rundir import versions
from rc_ray.models import embedded
from rc_ray.models.resolve import check_model, local_model
from rc_ray.rewards.encoding import encode
from rc_ray.training.preferences import Preference, read_preferences

RECORD = "reward_training.json"


@dataclass(frozen=True)
class RewardTrainingOptions:
    """How a reward model is trained. The defaults suit a small encoder and a few hundred pairs."""

    base: str = "embedded:minilm-l6"
    """Model to start from: anything `AutoModelForSequenceClassification` loads."""
    num_epochs: float = 2.0
    """Passes over the training pairs."""
    learning_rate: float = 5e-5
    """Peak learning rate of the pretrained layers (AdamW, linear decay after 10 % warm-up)."""
    head_learning_rate: float = 1e-3
    """Peak learning rate of the layers above the encoder, which start untrained."""
    batch_size: int = 16
    """Pairs per step."""
    max_length: int = 256
    """Most tokens of prompt and answer in training; the oldest part of a longer prompt is left out (counted). Pairs whose
    answer alone is longer are left out (counted)."""
    num_train: int | None = None
    """Most training pairs; None takes all that are not held out."""
    num_test: int | None = None
    """Held-out pairs; None holds out a tenth."""
    seed: int = 0
    """Seed of the split, the order and the head's initial weights."""

    def __post_init__(self) -> None:
        for name in ("num_train", "num_test", "num_epochs", "batch_size", "max_length", "learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} = {value}: must be positive")


@dataclass(frozen=True)
class RewardTrainingResult:
    """What training gave; also written to `reward_training.json` beside the weights."""

    output: str
    num_train: int
    num_test: int
    accuracy: float
    """Share of held-out pairs whose chosen answer scores higher; a tie counts as wrong."""
    accuracy_low: float
    accuracy_high: float
    """Ends of the 95 % Wilson interval of the accuracy."""
    length_accuracy: float
    """Accuracy of the rule "the longer answer is better" on the same pairs (a tie counts a half)."""
    num_prompts_cut: int
    """Texts whose prompt lost its oldest part to `max_length`."""
    left_out: dict[str, int]
    """Rows not used, by reason."""
    seconds: float
    reused: bool = False
    """Whether an earlier result with the same data and options was found in place."""


def train_reward(
    pairs: str,
    output: str,
    options: RewardTrainingOptions = RewardTrainingOptions(),
    on_progress: Callable[[int, int, float], None] | None = None,
) -> RewardTrainingResult:
    """Trains and saves a reward model; returns at once when `output` already holds the result of the same data and options.

    Args:
        pairs: file of preference pairs (`preferences.read_preferences`), or `embedded:helpful` / `embedded:harmless`.
        output: folder to write, or `embedded:reward-NAME` for the cache.
        options: see `RewardTrainingOptions`.
        on_progress: called after every step with (pairs done, pairs in all, loss).

    Raises:
        DataError: pairs unusable, too few, or `output` holds something else.
        ModelError: the base cannot be loaded.
    """
    check_model("base", options.base)
    preferences, left_out = read_preferences(pairs)
    recipe = {"pairs_hash": _hash(preferences), **asdict(options), "build": embedded.BUILD}
    folder = embedded.target(output) if output.startswith("embedded:") else Path(output)
    if (folder / RECORD).is_file():
        record = json.loads((folder / RECORD).read_text())
        if record["recipe"] == recipe:
            return RewardTrainingResult(**{**record["result"], "reused": True})
    if folder.exists() and not output.startswith("embedded:") and any(folder.iterdir()):
        raise DataError(f"output = {output!r}: the folder holds something else than this training's result; give a new folder")
    train, test = split_by_prompt(preferences, options)
    with embedded.build_once(folder, replace=True) as staged:
        assert staged is not None
        result = _train(train, test, dict(left_out), str(folder), staged, options, on_progress)
        (staged / RECORD).write_text(json.dumps({"recipe": recipe, "result": asdict(result), "versions": versions()}, indent=1))
    return result


def split_by_prompt(preferences: list[Preference], options: RewardTrainingOptions) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out pairs; all pairs of one prompt go to the same part.

    Raises:
        DataError: not enough pairs for the split asked for.
    """
    by_prompt: dict[str, list[Preference]] = {}
    for preference in preferences:
        by_prompt.setdefault(prompt_id(preference.messages), []).append(preference)
    order = list(by_prompt)
    random.Random(options.seed).shuffle(order)
    num_test = options.num_test if options.num_test is not None else max(1, len(preferences) // 10)
    test: list[Preference] = []
    train: list[Preference] = []
    for key in order:
        (test if len(test) < num_test else train).extend(by_prompt[key])
    train = train[: options.num_train]
    if len(test) < num_test or not train:
        raise DataError(
            f"{len(preferences)} pairs are too few for {num_test} held out and {options.num_train or 'some'} for training; "
            "lower --num-test or bring more pairs"
        )
    return train, test


def _hash(preferences: list[Preference]) -> str:
    canonical = canonical_json([asdict(p) for p in preferences])
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _train(
    train: list[Preference],
    test: list[Preference],
    left_out: dict[str, int],
    output: str,
    staged: Path,
    options: RewardTrainingOptions,
    on_progress: Callable[[int, int, float], None] | None,
) -> RewardTrainingResult:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_utils import set_seed

    started = time.monotonic()
    set_seed(options.seed)
    path = local_model(options.base)
    tokenizer = AutoTokenizer.from_pretrained(path)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # a new head is expected, and reported as a defect
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)

    num_cut = 0

    def encode_pairs(preferences: list[Preference]) -> list[dict[str, Any]]:
        nonlocal num_cut
        rows = []
        for p in preferences:
            sides = []
            for answer in (p.chosen, p.rejected):
                if len(tokenizer(answer)["input_ids"]) + 2 > options.max_length:  # leaves room for a prompt token
                    break
                sides.append(encode(tokenizer, p.messages, answer, options.max_length))
                num_cut += len(encode(tokenizer, p.messages, answer)["input_ids"]) > options.max_length
            if len(sides) < 2:
                left_out["answer longer than max_length"] = left_out.get("answer longer than max_length", 0) + 1
            else:
                rows.append({"chosen": sides[0], "rejected": sides[1], "length": len(sides[0]["input_ids"])})
        return rows

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(tokenizer.pad([r["chosen"] for r in rows] + [r["rejected"] for r in rows], return_tensors="pt"))

    def margins(module: Any, inputs: dict[str, Any]) -> Any:
        chosen, rejected = module(**inputs).logits[:, 0].chunk(2)
        return chosen - rejected

    class BradleyTerryTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
            return -torch.nn.functional.logsigmoid(margins(model, inputs)).mean()

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if on_progress is not None and logs and "loss" in logs:
                done = round(state.global_step / max(state.max_steps, 1) * total)
                on_progress(done, total, float(logs["loss"]))

    train_rows, test_rows = encode_pairs(train), encode_pairs(test)
    if not train_rows or not test_rows:
        raise DataError(
            f"max_length = {options.max_length}: only {len(train_rows)} training and {len(test_rows)} held-out pairs have answers that fit; raise it"
        )
    total = round(len(train_rows) * options.num_epochs)
    body = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name
    }
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in body], "lr": options.learning_rate},
        {"params": [p for n, p in model.named_parameters() if n not in body], "lr": options.head_learning_rate},
    ]
    trainer = BradleyTerryTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(staged / "unused"),
            num_train_epochs=options.num_epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            lr_scheduler_type="linear",
            seed=options.seed,
            save_strategy="no",
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list(train_rows),
        data_collator=collate,
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.01), None),
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    model.eval()
    correct = longer = 0.0
    test_rows.sort(key=lambda row: row["length"])
    with torch.inference_mode():
        for start in range(0, len(test_rows), 32):
            inputs = {k: v.to(model.device) for k, v in collate(test_rows[start : start + 32]).items()}
            correct += float((margins(model, inputs) > 0).sum())
    for p in test:
        longer += 0.5 if len(p.chosen) == len(p.rejected) else float(len(p.chosen) > len(p.rejected))
    low, high = wilson_interval(correct, len(test_rows))
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    return RewardTrainingResult(
        output=output,
        num_train=len(train_rows),
        num_test=len(test_rows),
        accuracy=correct / len(test_rows),
        accuracy_low=low,
        accuracy_high=high,
        length_accuracy=longer / len(test),
        num_prompts_cut=num_cut,
        left_out=left_out,
        seconds=time.monotonic() - started,
    )
