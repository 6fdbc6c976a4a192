"""DPO with TRL on Ray Train: pairs in Parquet to a trained policy folder.

Every worker reads the pairs itself and Hugging Face's sampler shards them by rank and seed. The loss is TRL's:
−log σ(β[(log π(y_w) − log π(y_l)) − (log π_ref(y_w) − log π_ref(y_l))]), arXiv 2305.18290; the reference is the policy that
training starts from.

Invariant: no pair is cut or left out: the longest pair sets max_length, or a smaller one is refused before any step. The last
batch of an epoch is filled up with pairs from its beginning, and how many is said. A finished training trains no step when it
is run again; a broken one goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from rc_ray.config import Config, TrainingConfig
from rc_ray.errors import DataError
from rc_ray.ledger.storage import Folder
from rc_ray.models.resolve import local_model
from rc_ray.training.workers import checkpoint_callback, fit, join, leave, remove, save_model

COLUMNS = ["prompt", "chosen", "rejected"]
EXPERIMENT = "dpo"


@dataclass(frozen=True)
class TrainingTask:
    """All that a training worker needs; plain values, sent through Ray."""

    model: str
    revision: str | None
    trust_remote_code: bool
    pairs: Folder
    output: Folder
    work: Folder
    training: TrainingConfig
    seed: int
    steps: int
    max_length: int
    on_gpu: bool
    stage: str


@dataclass(frozen=True)
class Preflight:
    """What is known before the first step. Lengths in tokens of prompt plus answer."""

    num_pairs: int
    longest_pair: int
    max_length: int
    steps: int
    repeated: int
    """Pairs taken twice per epoch so that all workers have equally many."""


def preflight(
    task_model: str, revision: str | None, trust_remote_code: bool, pairs: Folder, training: TrainingConfig
) -> Preflight:
    """Reads and measures the pairs. Runs on a worker, since it loads the tokenizer.

    Raises:
        DataError: no pair, a pair whose answers are equal, or pairs longer than a max_length that was set.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local_model(task_model), revision=revision, trust_remote_code=trust_remote_code)
    rows = pairs.read_all(columns=COLUMNS).to_pylist()
    if not rows:
        raise DataError(f"pairs = {pairs.uri!r}: there is no pair to train on; see drops/ for the reasons")
    lengths = []
    for number, row in enumerate(rows):
        if row["chosen"] == row["rejected"]:
            raise DataError(f"pairs = {pairs.uri!r}: chosen and rejected of pair {number} are equal")
        for side in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=True, return_dict=False)
            lengths.append(len(ids) + 1)  # TRL adds an end token where the template has none
    longest = max(lengths)
    if training.max_length is not None and longest > training.max_length:
        too_long = sum(length > training.max_length for length in lengths)
        raise DataError(
            f"training.max_length = {training.max_length}: {too_long} of {len(lengths)} answers are longer (longest {longest} tokens) and "
            "would be cut; raise it, or leave it out to fit the longest"
        )
    return Preflight(
        num_pairs=len(rows),
        longest_pair=longest,
        max_length=training.max_length or longest,
        steps=training.max_steps or math.ceil(math.ceil(len(rows) / training.global_batch_size) * training.num_epochs),
        repeated=-len(rows) % (training.num_workers * training.per_device_batch_size),
    )


def train_dpo(
    config: Config,
    pairs: Folder,
    output: Folder,
    work: Folder,
    train_cpus: float,
    train_gpus: float,
    board: Any,
    stage: str = "train",
) -> dict[str, Any]:
    """Trains on the connected cluster and writes the policy to `output`.

    Args:
        pairs: Parquet files with prompt, chosen, rejected as message lists.
        output: gets a plain Hugging Face folder.
        work: checkpoints while it runs; removed at the end.
        train_cpus, train_gpus: per worker.
        board: progress actor.

    Returns:
        Facts: pairs, steps, repeated pairs, max_length, and the log history of rank 0.

    Raises:
        DataError: see `preflight`.
        ClusterError: training failed more often than max_failures.
    """
    import ray
    from ray.exceptions import RayTaskError

    training = config.training
    check = ray.remote(num_cpus=min(1.0, train_cpus))(preflight)
    try:
        facts: Preflight = ray.get(
            check.remote(config.model, config.revision, config.trust_remote_code, pairs, training)  # type: ignore[attr-defined]
        )
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DataError) else error) from None
    ray.get(board.begin.remote(stage, "pairs", facts.steps * training.global_batch_size))
    task = TrainingTask(
        model=config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        pairs=pairs,
        output=output,
        work=work,
        training=training,
        seed=config.seed,
        steps=facts.steps,
        max_length=facts.max_length,
        on_gpu=train_gpus > 0,
        stage=stage,
    )
    fit(
        EXPERIMENT,
        _worker,
        {"task": task, "board": board},
        work,
        training.num_workers,
        train_cpus,
        train_gpus,
        training.max_failures,
    )
    history = (work / EXPERIMENT).read_json("log_history.json")
    remove(work)
    return {**asdict(facts), "log_history": history}


def _worker(loop_config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    task: TrainingTask = loop_config["task"]
    board = loop_config["board"]
    training = task.training
    place = join(task.work, task.on_gpu)

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if place.rank == 0 and logs and "loss" in logs:
                # TRL counts tokens from the beginning (or the resumed step) on.
                tokens = int(logs.get("num_tokens", 0))
                board.advance.remote(task.stage, training.global_batch_size, max(0, tokens - self._tokens))
                self._tokens = tokens

        _tokens = 0

    path = local_model(task.model)
    options = {"revision": task.revision, "trust_remote_code": task.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    resume = place.resume
    state = json.loads((resume / "trainer_state.json").read_text()) if resume else {"global_step": 0}
    if place.rank == 0:
        board.advance.remote(task.stage, state["global_step"] * training.global_batch_size, 0)
    if resume is not None and state["global_step"] >= task.steps:
        # Killed between the last checkpoint and the saved model. The Hugging Face trainer would train one step more.
        model, history = AutoModelForCausalLM.from_pretrained(resume, dtype=torch.float32), state["log_history"]
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True, **options)
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=str(place.shared),
                per_device_train_batch_size=training.per_device_batch_size,
                gradient_accumulation_steps=training.global_batch_size // (place.world * training.per_device_batch_size),
                learning_rate=training.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=training.warmup_steps,
                num_train_epochs=training.num_epochs,
                max_steps=training.max_steps or -1,
                beta=training.beta,
                loss_type=[training.loss_type],
                max_length=task.max_length,
                bf16=training.dtype == "bfloat16" or (task.on_gpu and training.dtype == "auto"),
                use_cpu=not task.on_gpu,
                gradient_checkpointing=training.gradient_checkpointing,
                save_strategy="steps",
                save_steps=training.save_every_steps,
                save_total_limit=1,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                seed=task.seed,
            ),
            train_dataset=Dataset(task.pairs.read_all(columns=COLUMNS)),
            processing_class=tokenizer,
            callbacks=[checkpoint_callback(place), Progress()],
        )
        trainer.remove_callback(PrinterCallback)
        board.ready.remote(task.stage)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        model, history = trainer.accelerator.unwrap_model(trainer.model), trainer.state.log_history
    save_model(place, task.output, model, tokenizer)
    if place.rank == 0:
        (task.work / EXPERIMENT).write_json("log_history.json", history)
    leave(place)
