"""DPO with TRL on Ray Train: pairs in Parquet to a trained policy folder.

    loss = -log sigma(beta [(log pi(y_w) - log pi(y_l)) - (log pi_ref(y_w) - log pi_ref(y_l))])          (TRL's; arXiv 2305.18290)

The reference is the policy that training starts from unless `training.reference.model` is another; its log-probs are columns, computed beforehand (`reference.py`), so that no reference model is in the
training process. Each node reads the tokens once, its workers map them from its disk, and Hugging Face's sampler shards them by rank and seed.

Invariant: no pair is cut; what is wrong with pairs is found before any step (`pairs.py`). With several workers the last batch of an epoch is filled up with pairs
from its beginning, and how many is said. A finished training trains no step when it is run again; a broken one goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rc_ray.config import Config, TrainingConfig
from rc_ray.config.load import result_fields
from rc_ray.errors import ConfigError, DataError, ModelError
from rc_ray.ledger.storage import Folder
from rc_ray.models.identity import model_identity
from rc_ray.models.loading import no_collections
from rc_ray.models.resolve import local_model
from rc_ray.training.arguments import check_training
from rc_ray.training.card import model_card
from rc_ray.training.curves import live_words, logp_changes, training_remarks
from rc_ray.training.pairs import PairCounts
from rc_ray.training.recipes import objective_weights
from rc_ray.training.reference import look, pairs_task, reference_logps
from rc_ray.training.sharding import deepspeed_config, is_sharded
from rc_ray.training.workers import (
    BEGUN,
    Place,
    checkpoint_callback,
    fit,
    hide_group_of_one,
    is_begun,
    join,
    leave,
    remove,
    rows_of_node,
    save,
)

EXPERIMENT, RECORD, OUTCOME = "dpo", "rc_ray_training.json", "outcome.json"
RUNS, PARTS, MODELS = "runs", "parts", "models"


@dataclass(frozen=True)
class TrainingTask:
    """All that a training worker needs; plain values, sent through Ray."""

    model: str
    revision: str | None
    trust_remote_code: bool
    tokens: Folder
    """With the files of `names`, in their order: `reference.TOKENS`."""
    names: list[str]
    objectives: list[str]
    """Of the rewards' differences in `tokens`."""
    output: Folder
    work: Folder
    curves: Folder
    """TensorBoard's files while it runs."""
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
    """That are trained on."""
    longest_pair: int
    max_length: int
    steps: int
    repeated: int
    """Pairs taken twice per epoch so that all workers have equally many."""
    too_long: int = 0
    """Pairs left out since they are longer than `training.max_length`."""


def preflight(config: Config, pairs: Folder, num_cpus: float) -> Preflight:
    """Looks at all pairs, on the connected cluster, before any step. That log-probs they bring are of the reference is left to the pass that has it loaded.

    Raises:
        DataError: no pair, or what is wrong with how many of them. ConfigError: the recipe does not fit them.
    """
    facts, counts = _look(config, pairs, num_cpus)
    _check_recipe(config.training, sorted(counts.rewards))
    return facts


def train_dpo(
    config: Config,
    pairs: Folder,
    output: Folder,
    work: Folder,
    train_cpus: float,
    train_gpus: float,
    board: Any,
    cache: Folder,
    stage: str = "train",
    finish: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> dict[str, Any]:
    """Trains on the connected cluster and writes the policy to `output`.

    Args:
        pairs: Parquet files with prompt, chosen, rejected as message lists.
        output: gets a plain Hugging Face folder.
        work: checkpoints while it runs; removed at the end.
        train_cpus, train_gpus: per worker.
        board: progress actor.
        cache: keeps the reference's log-probs, unless `training.reference.folder` says where.
        finish: gets the facts when the policy is whole, before the checkpoints are removed.

    Returns:
        Facts: those of `Preflight`, the recipe, hashes of data and reference, the log history of rank 0, the most memory that its process took
        (MiB), changes of log-probs (`curves.logp_changes`), what the user should know (`remarks`), and the share of padding in the reference pass where there was one.

    Raises:
        DataError: see `preflight`.
        ResumeError: `work` holds checkpoints of another training.
        ModelError: a loss or gradient is no number. ClusterError: training failed more often than max_failures.
    """
    training = config.training
    check_training(training, train_gpus > 0)
    facts, counts = _look(config, pairs, train_cpus)
    objectives = sorted(counts.rewards)
    _check_recipe(training, objectives)
    decides = _what_decides(config, counts)
    if not is_begun(work, decides):
        for name in (EXPERIMENT, PARTS, MODELS, RUNS):
            remove(work / name)
        work.write_json(BEGUN, decides)
    kept = cache if training.reference.folder is None else Folder.at(training.reference.folder)
    resources = (train_cpus, train_gpus)
    if training.recipe not in ("sequential", "soup"):
        scales = {name: (low, high) for name, (low, high) in counts.rewards.items()}
        prepared = {"objective": training.primary, "scales": scales if training.recipe == "reward_augmented" else None}
        done = _train_one(config, pairs, prepared, objectives, output, work, work / RUNS, kept, resources, board, stage)
    else:
        done = {"log_history": []}
        models: list[Folder] = []
        for number, name in enumerate(objectives):
            is_last = number == len(objectives) - 1
            target = output if training.recipe == "sequential" and is_last else work / MODELS / name
            given = config
            if training.recipe == "sequential" and models:
                given = config.model_copy(update={"model": models[-1].uri, "revision": None})
            if not target.exists(RECORD):
                found = _train_one(
                    given,
                    pairs,
                    {"objective": name, "brought": given is config},
                    objectives,
                    target,
                    work / PARTS / name,
                    work / RUNS / name,
                    kept,
                    resources,
                    board,
                    stage,
                )
                target.write_json(RECORD, found)
            done = {**done, **(record := target.read_json(RECORD)), "log_history": done["log_history"] + record["log_history"]}
            models.append(target)
        output.remove(RECORD)
        if training.recipe == "soup":
            done.pop("logp_changes", None)  # of the last model alone
            _on_a_node(average, train_cpus, models, objective_weights(training, objectives), output, config.trust_remote_code)
    found = {**asdict(facts), **done, "recipe": training.recipe}
    found["remarks"] = training_remarks(found)
    if (work / RUNS).exists():
        (work / RUNS).copy_to(output / RUNS)
    output.write_bytes("README.md", model_card(config, found).encode())
    finish(found)
    work.remove(BEGUN)  # first: what is left of the rest is nobody's
    remove(work)
    return found


def _what_decides(config: Config, counts: PairCounts) -> dict[str, Any]:
    """All that a training's outcome depends on."""
    reference = config.training.reference
    return {
        "pairs": f"{counts.digest:032x}",
        "model": model_identity(config.model, config.revision),
        "reference": model_identity(reference.model, reference.revision) if reference.model else None,
        "training": result_fields(config.training),
        "seed": config.seed,
    }


def _look(config: Config, pairs: Folder, num_cpus: float) -> tuple[Preflight, PairCounts]:
    training = config.training
    counts = look(config, pairs, training.least_workers, min(1.0, num_cpus))
    counts.check(pairs.uri, training.max_length, training.max_too_long_fraction)
    return _facts(training, counts), counts


def _facts(training: TrainingConfig, counts: PairCounts) -> Preflight:
    kept = counts.num_pairs - counts.problems["too_long"]
    return Preflight(
        num_pairs=kept,
        longest_pair=counts.longest,
        max_length=training.max_length or counts.longest,
        steps=training.max_steps or math.ceil(math.ceil(kept / training.global_batch_size) * training.num_epochs),
        repeated=-kept % (training.num_workers * training.per_device_batch_size) if training.num_workers > 1 else 0,
        too_long=counts.problems["too_long"],
    )


def _check_recipe(training: TrainingConfig, objectives: list[str]) -> None:
    """Names in the options of a recipe.

    Raises:
        ConfigError: pairs have no such objective.
    """
    named = [*training.weights, *([training.primary] if training.primary else [])]
    unknown = sorted(set(named) - set(objectives))
    if unknown:
        raise ConfigError(
            f"training.{'primary' if unknown[0] == training.primary else 'weights'}: the pairs have no rewards for {unknown[0]!r}; they have "
            f"{', '.join(objectives)}"
        )
    if training.recipe != "dpo" and training.recipe != "reward_augmented" and len(objectives) < 2:
        raise ConfigError(
            f"training.recipe = {training.recipe}: needs pairs with rewards of two objectives; they have {', '.join(objectives)}"
        )


def _train_one(
    config: Config, pairs: Folder, prepared: dict[str, Any], objectives: list[str], output: Folder, work: Folder, curves: Folder, cache: Folder,
    resources: tuple[float, float], board: Any, stage: str,
) -> dict[str, Any]:  # fmt: skip
    """One training of one policy, on pairs that are `prepared` for the recipe."""
    import ray

    from rc_ray.generation.hardware import num_cores

    training, (num_cpus, num_gpus) = config.training, resources
    actors = training.reference.num_actors or training.least_workers
    reading = replace(pairs_task(config, pairs, num_gpus > 0, max(1, num_cores() // actors)), **prepared)
    tokens, names, counts = reference_logps(reading, cache, actors, num_cpus, num_gpus)
    if prepared.get("scales"):  # goals make prompts longer
        counts.check(pairs.uri, training.max_length, training.max_too_long_fraction)
    if counts.num_pairs == counts.problems["too_long"]:
        raise DataError(f"pairs = {pairs.uri!r}: no pair is ordered by {prepared.get('objective')!r}; leave the objective out")
    facts = _facts(training, counts)
    ray.get(board.begin.remote(stage, "pairs", facts.steps * training.global_batch_size))
    task = TrainingTask(
        model=config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        tokens=tokens,
        names=names,
        objectives=objectives,
        output=output,
        work=work,
        curves=curves,
        training=training,
        seed=config.seed,
        steps=facts.steps,
        max_length=facts.max_length,
        on_gpu=num_gpus > 0,
        stage=stage,
    )
    fit(
        EXPERIMENT,
        _worker,
        {"task": task, "board": board},
        work,
        training.num_workers,
        num_cpus,
        num_gpus,
        training.max_failures,
        training.min_workers,
    )
    outcome = (work / EXPERIMENT).read_json(OUTCOME)
    if "diverged" in outcome:
        raise ModelError(
            f"training diverged: {outcome['diverged']}; lower training.learning_rate, or train in float32, and begin anew in another output "
            "(`rc-ray run CONFIG --fork-from RUN` samples and scores nothing again)"
        )
    found = {**asdict(facts), **outcome, "logp_changes": logp_changes(outcome["log_history"], training.beta)}
    found["reference"] = model_identity(reading.reference, reading.reference_revision)
    found["data_fingerprint"] = hashlib.blake2b("".join(names).encode(), digest_size=16).hexdigest()
    if counts.num_padded_tokens:
        found["reference_padding_share"] = round(1 - counts.num_read_tokens / counts.num_padded_tokens, 4)
    return found


def _on_a_node(function: Any, num_cpus: float, *arguments: Any) -> None:
    """Runs a function as a Ray task."""
    import ray

    ray.get(ray.remote(num_cpus=min(1.0, num_cpus))(function).remote(*arguments))  # type: ignore[attr-defined]


def average(models: list[Folder], weights: list[float], output: Folder, trust_remote_code: bool = False) -> None:
    """Writes the weighted mean of policies' weights, one model after the other in memory (rewarded soups, arXiv 2306.04488)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mean: Any = None
    for folder, weight in zip(models, weights, strict=True):
        model = AutoModelForCausalLM.from_pretrained(
            local_model(folder.uri), dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        with torch.no_grad():
            if mean is None:
                mean = model
                for parameter in mean.parameters():
                    parameter.mul_(weight)
            else:
                for parameter, other in zip(mean.parameters(), model.parameters(), strict=True):
                    parameter.add_(other, alpha=weight)
    tokenizer = AutoTokenizer.from_pretrained(local_model(models[0].uri), trust_remote_code=trust_remote_code)
    save(output, mean, tokenizer)


def _worker(loop_config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    with no_collections():
        from transformers import AutoTokenizer, TrainerCallback, set_seed
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config
        from transformers.trainer_callback import PrinterCallback

        from rc_ray.training.lora import finish_lora, lora_of
        from rc_ray.training.policy import copy_policy, load_policy, write_policy
        from rc_ray.training.trainer import ReferenceDPOTrainer

    task: TrainingTask = loop_config["task"]
    board = loop_config["board"]
    training = task.training
    place = join(task.work, task.on_gpu)

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            # In float16 a gradient that is too large for it is left out, and the next ones are scaled less.
            wrong = [
                name
                for name in ("loss", *(() if args.fp16 else ("grad_norm",)))
                if not math.isfinite((logs or {}).get(name, 0.0))
            ]
            if wrong:  # as on every rank; no error, after which Ray would begin again from the last checkpoint
                self.diverged = f"{wrong[0]} of step {state.global_step} is {logs[wrong[0]]}"
                control.should_training_stop, control.should_save = True, False
            if place.rank == 0 and logs and "loss" in logs:
                # TRL counts tokens from the beginning (or the resumed step) on.
                tokens = int(logs.get("num_tokens", 0))
                board.advance.remote(task.stage, training.global_batch_size, max(0, tokens - self._tokens))
                board.say.remote(task.stage, live_words(state.log_history, training.beta))
                self._tokens = tokens

        def on_save(self, *_: Any, **__: Any) -> None:
            keep_curves()

        _tokens = 0
        diverged = ""

    # A folder that all nodes reach is written at once, so that it can be watched; another one at every checkpoint.
    curves = Path(task.curves.filesystem()[1]) if task.curves.is_local else place.shared / RUNS
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(curves)
    curves.mkdir(parents=True, exist_ok=True)  # W&B would take another folder
    os.environ.setdefault("WANDB_DIR", str(curves))

    def keep_curves() -> None:
        if place.rank == 0 and not task.curves.is_local:
            with contextlib.suppress(OSError):  # no reason to train anything again; the next checkpoint brings them
                task.curves.upload(curves)

    path = local_model(task.model)
    options = {"revision": task.revision, "trust_remote_code": task.trust_remote_code}
    resume = place.resume
    state = json.loads((resume / "trainer_state.json").read_text()) if resume else {"global_step": 0}
    if place.rank == 0:
        board.advance.remote(task.stage, state["global_step"] * training.global_batch_size, 0)
    final = place.shared / "final"
    if resume is not None and state["global_step"] >= task.steps:
        # Killed between the last checkpoint and the saved model. The Hugging Face trainer would train one step more.
        if place.rank == 0:
            copy_policy(resume, final)
        history, peak_mib = state["log_history"], _peak_mib()
    else:
        set_seed(task.seed)  # a LoRA begins at random
        rows = rows_of_node(task.tokens, task.names, place)
        if not is_sharded(training):
            hide_group_of_one(place)
        # Before the policy is loaded: DeepSpeed's ZeRO 3 shards it as it is read.
        arguments, progress = dpo_config(task, place), Progress()
        trainer = ReferenceDPOTrainer(
            training,
            task.objectives,
            model=load_policy(path, training, task.on_gpu, **options),
            peft_config=lora_of(training, "CAUSAL_LM"),
            args=arguments,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(path, **options),
            callbacks=[checkpoint_callback(place), progress],
        )
        trainer.remove_callback(PrinterCallback)
        board.ready.remote(task.stage)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        history, peak_mib = trainer.state.log_history, _peak_mib()
        if progress.diverged:
            if place.rank == 0:
                (task.work / EXPERIMENT).write_json(OUTCOME, {"diverged": progress.diverged})
            leave(place)
            return
        write_policy(trainer, final)
        del trainer
        if training.trl.get("deepspeed"):  # else ZeRO 3 would wait for all ranks to shard what the first one reads from here on
            unset_hf_deepspeed_config()
        if "wandb" in training.report_to:
            import wandb

            wandb.finish()  # what is not sent yet
    if place.rank == 0:
        if training.lora_rank is not None:
            finish_lora(final, training, task.model, **options)
        task.output.upload(final)
        keep_curves()
        (task.work / EXPERIMENT).write_json(OUTCOME, {"log_history": history, "peak_memory_mib": round(peak_mib, 1)})
    leave(place)


def _peak_mib() -> float:
    """The most memory that this process has had, in MiB; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def dpo_config(task: TrainingTask, place: Place) -> Any:
    """TRL's configuration of a worker."""
    from trl import DPOConfig

    from rc_ray.training.lora import in_bfloat16

    training = task.training
    given = training.trl.get("deepspeed")
    sharded = {"deepspeed": deepspeed_config(given)} if given else {}
    return DPOConfig(
        output_dir=str(place.shared),
        per_device_train_batch_size=training.per_device_batch_size,
        gradient_accumulation_steps=training.global_batch_size // (place.world * training.per_device_batch_size),
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        num_train_epochs=training.num_epochs,
        max_steps=training.max_steps or -1,
        beta=training.beta,
        loss_type=training.losses,
        max_length=task.max_length,
        bf16=in_bfloat16(training, task.on_gpu),
        use_cpu=not task.on_gpu,
        gradient_checkpointing=training.gradient_checkpointing,
        save_strategy="steps",
        save_steps=training.save_every_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=training.report_to or "none",
        run_name=task.output.uri.rstrip("/").rsplit("/", 1)[-1],
        disable_tqdm=True,
        seed=task.seed,
        precompute_ref_log_probs=True,
        **({"lr_scheduler_type": "linear"} | training.trl | sharded),
    )
