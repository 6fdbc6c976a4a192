"""The training loop of a reward model: one worker of Ray Train, or this process alone.

A step takes `batch_size` pairs of every preference set in one forward pass; its loss is the sum of the sets' Bradley-Terry losses, weighted equally
or by MORE (`rc_ray.training.more`).
"""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rc_ray.config import ClassifierReward, RewardTrainingConfig
from rc_ray.errors import ModelError
from rc_ray.ledger.storage import Folder
from rc_ray.models.resolve import local_model
from rc_ray.rewards.batches import TokenBatches
from rc_ray.rewards.encoding import set_padding
from rc_ray.training.lora import in_bfloat16, lora_of, weights_dtype

if TYPE_CHECKING:
    from rc_ray.training.workers import Place

EXPERIMENT, DATA, FACTS, DIFFERENCES = "reward", "data", "facts.json", "held_out.parquet"


@dataclass(frozen=True)
class RewardTask:
    """All that a worker needs; plain values, sent through Ray."""

    names: list[str]
    """Of the preference sets."""
    options: RewardTrainingConfig
    output: Folder
    work: Folder
    on_gpu: bool
    stage: str


def ray_worker(loop_config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    from rc_ray.training.workers import join, leave, save

    task: RewardTask = loop_config["task"]
    board = loop_config["board"]
    place = join(task.work, task.on_gpu)
    train, held_out = ((task.work / DATA).read_table(f"{part}.parquet") for part in ("train", "held_out"))
    counted = [0]

    def on_step(done: int, loss: float) -> None:
        if place.rank == 0:
            board.advance.remote(task.stage, done - counted[0], 0)
            counted[0] = done

    if place.rank == 0:
        board.ready.remote(task.stage)
    model, tokenizer, facts, judged = train_reward_model(task.names, task.options, train, held_out, task.on_gpu, on_step, place)
    if place.rank == 0:
        save(task.output, model, tokenizer)
        (task.work / EXPERIMENT).write_table(DIFFERENCES, judged)
        (task.work / EXPERIMENT).write_json(FACTS, facts)
    leave(place)


def train_reward_model(
    names: list[str],
    options: RewardTrainingConfig,
    train: pa.Table,
    held_out: pa.Table,
    on_gpu: bool,
    on_step: Callable[[int, float], None],
    place: Place | None,
) -> tuple[Any, Any, dict[str, Any], pa.Table]:
    """Trains and judges a sequence classifier.

    Args:
        train, held_out: see `reward_data.Encoded`.
        on_step: called with the rows done so far (pairs of each set) and the loss.
        place: among Ray Train's workers; None: alone, without checkpoints.

    Returns:
        The model, with a LoRA merged into it; its tokenizer; mean weight per set and share of conflicts (`more` only); and for each held-out
        pair `set`, `prompt_id` and `difference`, r(chosen) - r(rejected), on rank 0.
    """
    import torch
    from datasets import Dataset
    from torch.utils.data import Sampler
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_pt_utils import get_length_grouped_indices
    from transformers.trainer_utils import set_seed

    from rc_ray.training.more import EqualWeights, MoreWeights, pair_losses
    from rc_ray.training.policy import LoadsByFileNames
    from rc_ray.training.workers import checkpoint_callback

    set_seed(options.seed)
    model, tokenizer = load_base(names, options, on_gpu)
    head = head_of(model, options.base)
    weigh = MoreWeights(head, options.momentum, options.normalize) if options.method == "more" else EqualWeights()
    columns = torch.arange(len(names)) if options.heads == "per_objective" else torch.zeros(len(names), dtype=torch.long)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = [row["pairs"][t] for t in range(len(names)) for row in rows]
        texts = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
        margins = torch.tensor([pair["margin"] for pair in pairs]).reshape(len(names), len(rows))
        return {**tokenizer.pad(texts, return_tensors="pt"), "margins": margins}

    class ByLength(Sampler):
        """Rows of like length side by side, in an order by seed and epoch alone: the same on all workers, and on one that goes on in an epoch."""

        def __init__(self, rows_per_step: int) -> None:
            self._lengths, self._rows_per_step = train.column("length").to_pylist(), rows_per_step

        def __len__(self) -> int:
            return len(self._lengths)

        def __iter__(self) -> Iterator[int]:
            generator = torch.Generator().manual_seed(options.seed + int(trainer.state.epoch or 0))
            return iter(get_length_grouped_indices(self._lengths, self._rows_per_step, generator=generator))

    class PreferenceTrainer(LoadsByFileNames, Trainer):
        def _get_train_sampler(self, *_: Any) -> ByLength:
            return ByLength(self.args.train_batch_size * self.args.gradient_accumulation_steps)

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
            margins = inputs.pop("margins")
            scores = model(**inputs).logits.float().reshape(2, *margins.shape, -1)
            of = columns.to(scores.device)[None, :, None, None].expand(*scores.shape[:3], 1)
            chosen, rejected = scores.gather(3, of)[..., 0]
            losses = pair_losses(chosen - rejected, margins, options.label_smoothing)
            return (weigh(losses) * losses).sum()

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                on_step(round(state.global_step / max(state.max_steps, 1) * total), float(logs["loss"]))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if isinstance(weigh, MoreWeights) and place is not None and place.rank == 0:
                weigh.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    total = round(len(train) * options.num_epochs)
    world = 1 if place is None else place.world
    per_device = options.per_device_batch_size or options.batch_size // world
    is_head = [
        "modules_to_save" in name
        or not (options.lora_rank or name.startswith(f"{model.base_model_prefix}."))
        or ".pooler." in name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p, new in zip(trained, is_head, strict=True) if new == part], "lr": rate}
        for part, rate in ((False, options.learning_rate), (True, options.head_learning_rate))
    ]
    with tempfile.TemporaryDirectory(prefix="rc_ray-reward-") as scratch:
        args = TrainingArguments(
            output_dir=scratch if place is None else str(place.shared),
            num_train_epochs=options.num_epochs,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=options.batch_size // (world * per_device),
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            lr_scheduler_type="linear",
            seed=options.seed,
            bf16=in_bfloat16(options, on_gpu),
            use_cpu=not on_gpu,
            gradient_checkpointing=options.gradient_checkpointing,
            save_strategy="no" if place is None else "steps",
            save_steps=options.save_every_steps,
            save_total_limit=1,
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
            remove_unused_columns=False,
        )
        args._n_gpu = min(1, args.n_gpu)  # else transformers takes all GPUs that it sees, and larger batches
        trainer = PreferenceTrainer(
            model=model,
            args=args,
            train_dataset=Dataset(train),
            data_collator=collate,
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.01), None),
            callbacks=[Report()] if place is None else [Report(), checkpoint_callback(place)],
        )
        trainer.remove_callback(PrinterCallback)
        resume = None if place is None else place.resume
        state = json.loads((resume / "trainer_state.json").read_text()) if resume else {"global_step": 0, "max_steps": math.inf}
        if resume and isinstance(weigh, MoreWeights):
            weigh.load(resume)
        if state["global_step"] >= state["max_steps"]:
            # Killed between the last checkpoint and the saved model. The Hugging Face trainer would train one step more.
            trainer._load_from_checkpoint(str(resume))
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        model = trainer.accelerator.unwrap_model(trainer.model)
    weights, conflicts = weigh.facts() if isinstance(weigh, MoreWeights) else (None, None)
    differences = []
    if place is None or place.rank == 0:
        judge = model
        if options.lora_rank:
            # Not in bfloat16, which would round away what it has learned, and not on a GPU, which may have no room for more than that.
            judge = model = model.cpu().float().merge_and_unload()
            if on_gpu:
                judge = copy.deepcopy(model).to("cuda", weights_dtype(options, on_gpu))
        differences = _differences(judge, tokenizer, held_out, columns, on_gpu)
    judged = pa.table(
        {
            "set": held_out.column("set"),
            "prompt_id": held_out.column("prompt_id"),
            "difference": pa.array(differences or [math.nan] * len(held_out), pa.float64()),
        }
    )
    return model, tokenizer, {"weights": weights, "conflicts": conflicts}, judged


def load_base(names: list[str], options: RewardTrainingConfig, on_gpu: bool) -> tuple[Any, Any]:
    """A classifier with one new logit, or one per objective, and its tokenizer.

    The first weights of the logits depend on the seed alone.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = local_model(options.base)
    code: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(path, **code)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # a new head is expected, and reported as a defect
    labels = names if options.heads == "per_objective" else ["reward"]
    model = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        dtype=weights_dtype(options, on_gpu),
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        **code,
    )
    set_padding(tokenizer, model.config)
    # Its head is new: what it is to take for padding is what it gets.
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if options.lora_rank:
        from peft import get_peft_model

        model = get_peft_model(model, lora_of(options, "SEQ_CLS"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if options.gradient_checkpointing:
            model.enable_input_require_grads()
    return model, tokenizer


def head_of(model: Any, name: str) -> Any:
    """The last layer, which makes the logits.

    Raises:
        ModelError: it is not a linear layer with one row per logit.
    """
    import torch

    found = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
        and module.out_features == model.config.num_labels
        and module.weight.requires_grad
    ]
    if not found:
        raise ModelError(
            f"base = {name!r}: {type(model).__name__} has no linear layer that makes its {model.config.num_labels} logits; take a sequence classifier that has"
        )
    return found[-1]


def _differences(model: Any, tokenizer: Any, held_out: pa.Table, columns: Any, on_gpu: bool) -> list[float]:
    """r(chosen) - r(rejected) of every held-out pair."""
    import torch

    model.eval()
    rows = held_out.to_pylist()
    texts = [(row[side], int(columns[row["set"]])) for row in rows for side in ("chosen", "rejected")]

    def forward(batch: list[int]) -> list[float]:
        inputs = tokenizer.pad([texts[i][0] for i in batch], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits = model(**inputs).logits.float().cpu()
        return [float(logits[row, texts[i][1]]) for row, i in enumerate(batch)]

    batches = TokenBatches(ClassifierReward.model_fields["max_batch_tokens"].default, None, on_gpu)
    scores = batches.score([len(text["input_ids"]) for text, _ in texts], forward)
    for score in scores:
        if score.value is None:
            raise ModelError(
                f"the trained model gives a held-out answer no reward: {score.missing}; lower --learning-rate if it diverged, --max-length if memory ran out"
            )
    values = [score.value or 0.0 for score in scores]
    return [chosen - rejected for chosen, rejected in zip(values[::2], values[1::2], strict=True)]
