"""What all training on Ray Train shares: workers, checkpoints that are whole, going on from the last one.

Invariant: a checkpoint reaches storage from the first rank of a node alone, between two barriers, so that no half-written file is copied. Other
nodes add only what differs by rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rc_ray.config import differences
from rc_ray.errors import ClusterError, ResumeError
from rc_ray.generation.hardware import cpu_runtime_env
from rc_ray.ledger.storage import Folder

# The other workers wait while the first one reads or writes a checkpoint or a merged model; Ray's default of half an hour is short for 70B.
COLLECTIVE_TIMEOUT_S = 7200
# Files that are read at a time.
NUM_READERS = 8

BEGUN = "begun.json"
"""In the folder of a training that runs or was killed: all that its outcome depends on."""
CHECKPOINT = "step-"
# Ray Train's record of the checkpoints that count, and what it has of others.
SNAPSHOT = "checkpoint_manager_snapshot.json"
SNAPSHOT_LISTS = (
    "pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names", "timed_out_validation_checkpoint_dir_names",
    "failed_validation_checkpoint_dir_names",
)  # fmt: skip


def is_begun(work: Folder, decides: dict[str, Any]) -> bool:
    """Whether this training was begun there and can go on. One that reached no checkpoint leaves nothing to lose, so another may take its place.

    Args:
        decides: all that the training's outcome depends on.

    Raises:
        ResumeError: the folder holds checkpoints of another training.
    """
    begun = work.read_json(BEGUN) if work.exists(BEGUN) else None
    if begun in (None, decides):
        return begun is not None
    if any(f"/{CHECKPOINT}" in path for path, _, _ in work.listing()):
        raise ResumeError(
            f"{work.uri!r} holds checkpoints of another training ({'; '.join(differences(begun, decides))}); bring back what it began with to go on "
            "with it, or remove that folder to train anew"
        )
    return False


def fit(
    name: str,
    worker: Callable[[dict[str, Any]], None],
    loop_config: dict[str, Any],
    work: Folder,
    num_workers: int,
    num_cpus: float,
    num_gpus: float,
    max_failures: int,
    min_workers: int | None = None,
) -> None:
    """Runs a worker function on the connected cluster until it has ended on every rank.

    Args:
        name: of the training; its checkpoints are in `work / name`.
        worker: gets `loop_config` on every rank.
        work: a folder that all nodes reach.
        num_cpus, num_gpus: per worker.
        max_failures: restarts from the last checkpoint before it gives up.
        min_workers: with so many it may start, and go on with more or fewer as nodes come and go.

    Raises:
        ClusterError: it failed more often than `max_failures`.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths mean the same as in all other stages
    mend_record(work / name)
    filesystem, path = work.filesystem()
    resources = {"CPU": num_cpus} | ({"GPU": num_gpus} if num_gpus else {})
    workers = num_workers if min_workers in (None, num_workers) else (min_workers, num_workers)
    # FSDP exchanges what it has offloaded to the host's memory, too.
    backend = "cpu:gloo,cuda:nccl" if num_gpus else "gloo"
    trainer = TorchTrainer(
        worker,
        train_loop_config=loop_config,
        torch_config=TorchConfig(backend=backend, timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=num_gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=None if work.is_local else filesystem,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            worker_runtime_env=None if num_gpus else cpu_runtime_env(),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray Train wraps what its workers raised in types of its own
        raise ClusterError(
            f"training failed: {type(error).__name__}: {error}\nThe last checkpoint is kept; run the same command again to resume."
        ) from error


def mend_record(folder: Folder) -> None:
    """Writes Ray Train's record of checkpoints anew where a kill or a full disk broke it off, which Ray would refuse from then on.

    It is written when all workers have reported, so the last checkpoint there is whole. Where there is no record, none may be.
    """
    found = [path for path, _, _ in folder.listing()]
    steps = [path.split("/")[1] for path in found if path.endswith("/trainer_state.json")]
    if not steps or f"/{SNAPSHOT}" not in found:
        return
    with contextlib.suppress(ValueError):
        folder.read_json(SNAPSHOT)
        return
    last = {"checkpoint_dir_name": max(steps), "metrics": {}}
    nothing: dict[str, Any] = {name: [] for name in SNAPSHOT_LISTS}
    one = {
        "checkpoint_results": [last],
        "latest_checkpoint_result": last,
        "checkpoint_report_indices": [0],
        "current_report_index": 1,
    }
    folder.write_json(SNAPSHOT, nothing | one)


def remove(folder: Folder) -> None:
    """Deletes a folder with all that is in it, if it is there."""
    if folder.exists():
        filesystem, path = folder.filesystem()
        filesystem.delete_dir(path)


@dataclass(frozen=True)
class Place:
    """One worker among all, and its folders on this node."""

    rank: int
    local_rank: int
    world: int
    shared: Path
    """One per node: checkpoints before they are in storage, and the one to go on from, which its first rank fetches."""
    resume: Path | None
    """The last checkpoint, if there is one."""


def join(work: Folder, on_gpu: bool) -> Place:
    """Called by every worker first: fetches the last checkpoint, and takes its share of the cores."""
    import ray.train
    import torch

    from rc_ray.generation.hardware import num_cores

    context = ray.train.get_context()
    if not on_gpu:
        torch.set_num_threads(max(1, num_cores() // context.get_local_world_size()))
    digest = hashlib.blake2b(work.uri.encode(), digest_size=8).hexdigest()
    shared = Path(tempfile.gettempdir()) / f"rc_ray-training-{digest}-{context.get_node_rank()}"
    checkpoint = ray.train.get_checkpoint()
    if context.get_local_rank() == 0:
        shutil.rmtree(shared, ignore_errors=True)
        if checkpoint is not None:
            checkpoint.to_directory(shared / "resume")
    torch.distributed.barrier()
    return Place(
        rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        world=context.get_world_size(),
        shared=shared,
        resume=shared / "resume" if checkpoint is not None else None,
    )


def hide_group_of_one(place: Place) -> None:
    """Lets a single worker that shards nothing train like a process by itself.

    By the variables that Ray Train sets, accelerate wraps a model in DDP even where there is nobody to exchange gradients with, and DDP's buckets take
    as much memory as all gradients. With several GPUs they stay, since transformers would spread the batch over them.
    """
    import torch

    if place.world == 1 and torch.cuda.device_count() <= 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)


def rows_of_node(folder: Folder, names: list[str], place: Place) -> Any:
    """All rows of the named Parquet files, which have one schema, in their order, as a `datasets.Dataset`.

    The first worker of a node reads them once; its workers map the same file of the node's disk, so that none holds them in memory.
    """
    import torch
    from datasets import Dataset

    path = place.shared / "rows.arrow"
    if place.local_rank == 0:
        place.shared.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(NUM_READERS) as pool:
            writer = None
            for start in range(0, len(names), NUM_READERS):
                for table in pool.map(folder.read_table, names[start : start + NUM_READERS]):
                    writer = writer or stack.enter_context(pa.ipc.new_stream(str(path), table.schema))
                    writer.write_table(table)
    torch.distributed.barrier()
    return Dataset.from_file(str(path))


def leave(place: Place) -> None:
    """Called by every worker last."""
    import torch

    torch.distributed.barrier()
    if place.local_rank == 0:
        shutil.rmtree(place.shared, ignore_errors=True)


def save(output: Folder, *parts: Any) -> None:
    """Writes what has a `save_pretrained` (model, tokenizer) to `output`."""
    with tempfile.TemporaryDirectory(prefix="rc_ray-model-") as scratch:
        for part in parts:
            part.save_pretrained(scratch)
        output.upload(scratch)


def checkpoint_callback(place: Place) -> Any:
    """For Hugging Face's trainer: every checkpoint it writes goes to Ray Train's storage."""
    import ray.train
    import torch
    from transformers import TrainerCallback

    class ReportToRay(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.distributed.barrier()
            checkpoint = None
            source = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if place.local_rank == 0:
                if place.rank != 0:
                    for file in source.glob("*"):  # folders hold the shards of a sharded policy
                        if file.is_file() and not file.name.startswith("rng_state"):
                            file.unlink()
                checkpoint = ray.train.Checkpoint.from_directory(source)
            ray.train.report(
                {"step": state.global_step}, checkpoint=checkpoint, checkpoint_dir_name=f"{CHECKPOINT}{state.global_step:06d}"
            )
            if place.local_rank == 0 and place.rank != 0:  # the trainer removes old ones on the first node only
                shutil.rmtree(source)
            torch.distributed.barrier()

    return ReportToRay()
