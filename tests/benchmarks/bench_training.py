"""DPO on Ray Train against TRL alone, the reference pass on one and two actors, and one worker against two.

    python tests/benchmarks/bench_training.py [--quick] [--output DIR] [--rounds N] [--only PART ...] [--data FILE]

Competitors take turns, each in a fresh process, on the same pairs (hh-rlhf, helpful) with SmolLM2-135M, the same seed and so the same batches; a ratio is of
one round, and printed are the median and, in brackets, the lowest and highest. --quick takes a tiny random model.

training   pairs per second, from the first step's end to the last one's: TRL alone with its reference model, rc_ray with reference columns, and, both with the
           environment that rc_ray gives its workers (`hardware.KEPT_MEMORY`), TRL alone once more and TRL with the same columns but without Ray; the latter
           and rc_ray also with one core left free, where Ray's own processes do not run on the cores of the training. The pass that computes the columns
           is timed too: in one epoch it costs what it saves, from the second epoch on it is kept.
reference  the pass by one actor and by two, each with one thread, from the start of the pass (loading the model included).
curves     loss of 20 steps on one worker and on two with the same global batch.

Exit status 1 when a bar is missed; with --quick only when results are wrong.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import CORE_LEFT, MIB, ROOT, Results, Spec, asker, begin_rounds, is_worker, ratios, spread

from rc_ray.generation.hardware import KEPT_MEMORY

sys.path.insert(0, str(ROOT))
PARTS = ["training", "reference", "curves"]
RULE = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 3}}


def config_of(spec: Spec, output: str) -> Any:
    from rc_ray.config import load_config

    return load_config({
        "model": spec["model"],
        "output": output,
        "prompts": {"path": "unused"},
        "rewards": {"a": RULE, "b": RULE},
        "training": {"learning_rate": 1e-5, "save_every_steps": 10_000, "dtype": "float32", **spec["training"]},
    })  # fmt: skip


class Clock:
    """In the place of the progress board, as a Ray actor: when each step was reported."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def begin(self, *_: Any) -> None: ...

    def ready(self, *_: Any) -> None: ...

    def say(self, *_: Any) -> None: ...

    def advance(self, stage: str, done: int, *_: Any) -> None:
        if done:
            self.times.append(time.time())

    def stamps(self) -> list[float]:
        return self.times


def rc_ray(spec: Spec) -> Spec:
    """Training in full, with the columns of an earlier pass if there was one."""
    import ray

    from rc_ray.ledger.storage import Folder
    from rc_ray.pipeline.cluster import connected
    from rc_ray.training.dpo import train_dpo

    with tempfile.TemporaryDirectory() as folder:
        config = config_of(spec, f"{folder}/run")
        output, work = Folder.at(f"{folder}/model"), Folder.at(f"{folder}/work")
        with connected(config.cluster):
            clock = ray.remote(num_cpus=0)(Clock).remote()
            facts = train_dpo(config, Folder.at(spec["pairs"]), output, work, 1.0, 0.0, clock, Folder.at(spec["cache"]))
            stamps = ray.get(clock.stamps.remote())
    losses = [entry["loss"] for entry in facts["log_history"] if "loss" in entry]
    return {"stamps": stamps, "losses": losses, "peak_mib": facts["peak_memory_mib"]}


def plain_trl(spec: Spec) -> Spec:
    """TRL by itself: with a reference model, or with `columns` on rows that have its log-probs."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from rc_ray.generation.hardware import num_cores
    from rc_ray.models.resolve import local_model

    torch.set_num_threads(num_cores())
    config, stamps = config_of(spec, "unused"), []
    training, path = config.training, local_model(spec["model"])

    class Stamps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                stamps.append(time.time())

    kind: Callable[..., Any] = DPOTrainer
    table = pq.read_table(spec["pairs"], columns=["prompt", "chosen", "rejected"])
    if spec.get("columns"):
        from rc_ray.training.trainer import ReferenceDPOTrainer

        files = [pq.read_table(file) for file in Path(spec["cache"]).glob("*/*.parquet")]
        table = pa.concat_tables(sorted(files, key=lambda each: each.column("row")[0].as_py()))

        def kind(**options: Any) -> Any:
            return ReferenceDPOTrainer(training, [], **options)

    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            args=DPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=training.per_device_batch_size,
                learning_rate=training.learning_rate, lr_scheduler_type="linear", num_train_epochs=1, max_steps=training.max_steps or -1, logging_steps=1,
                save_strategy="steps", save_steps=10_000, seed=config.seed, gradient_checkpointing=False, max_length=None, disable_tqdm=True,
                precompute_ref_log_probs=bool(spec.get("columns")),
            ),
            train_dataset=Dataset(table),
            processing_class=AutoTokenizer.from_pretrained(path),
            callbacks=[Stamps()],
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    return {"stamps": stamps, "losses": losses, "peak_mib": peak}


def reference_pass(spec: Spec) -> Spec:
    """The reference's log-probs of all pairs, by a number of actors with one thread each."""
    from rc_ray.ledger.storage import Folder
    from rc_ray.pipeline.cluster import connected
    from rc_ray.training.reference import pairs_task, reference_logps

    config = config_of(spec, "unused")
    with connected(config.cluster):
        task = pairs_task(config, Folder.at(spec["pairs"]), False, spec["threads"])
        start = time.perf_counter()
        _, _, counts = reference_logps(task, Folder.at(spec["cache"]), spec["actors"], 1.0, 0.0)
        seconds = time.perf_counter() - start
    padding = 1 - counts.num_tokens / counts.num_padded_tokens
    return {"seconds": seconds, "tokens": counts.num_tokens, "padding": padding}


WORKERS: dict[str, Callable[[Spec], Spec]] = {f.__name__: f for f in (rc_ray, plain_trl, reference_pass)}
ask, ask_as_ours = asker(__file__), asker(__file__, KEPT_MEMORY)
ask_apart, ask_apart_as_ours = asker(__file__, CORE_LEFT), asker(__file__, CORE_LEFT | KEPT_MEMORY)


# ---------------------------------------------------------------- parts


def pairs_file(folder: Path, data: Path, number: int, lengths: tuple[int, int]) -> str:
    """Pairs of which both answers have so many words with their prompt."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rc_ray.training.preferences import read_preferences

    rows = []
    for pair in read_preferences(str(data))[0]:
        before = sum(len(message["content"].split()) for message in pair.messages)
        words = [before + len(answer.split()) for answer in (pair.chosen, pair.rejected)]
        if lengths[0] <= min(words) and max(words) <= lengths[1]:
            answers = {
                side: [{"role": "assistant", "content": text}]
                for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
            }
            rows.append({"prompt": pair.messages, **answers})
    assert len(rows) >= number, f"{len(rows)} pairs of this length, {number} are wanted"
    (folder / "pairs").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:number]), folder / "pairs" / "part.parquet")
    return str(folder / "pairs")


def lengths(results: Results, of_words: tuple[int, int]) -> tuple[int, int]:
    """For the tiny model, which takes a letter for a token, shorter ones."""
    return (5, 25) if results.quick else of_words


def model_of(results: Results, folder: Path) -> str:
    if not results.quick:
        return "embedded:smollm2-135m"
    from tests.conftest import make_llama

    return str(make_llama(folder / "tiny", seed=0))


def speed(found: list[Spec], pairs_per_step: int) -> list[float]:
    return [(len(f["stamps"]) - 1) * pairs_per_step / (f["stamps"][-1] - f["stamps"][0]) for f in found]


def part_training(results: Results, folder: Path, data: Path, rounds: int) -> None:
    steps, batch = (4, 4) if results.quick else (9, 4)
    spec = {"model": model_of(results, folder), "cache": str(folder / "cache")}
    spec["pairs"] = pairs_file(folder, data, steps * batch, lengths(results, (50, 120)))
    spec["training"] = {"num_workers": 1, "global_batch_size": batch, "per_device_batch_size": batch}
    print(f"\ntraining: {steps} steps of {batch} pairs")
    first = ask("reference_pass", {**spec, "actors": 1, "threads": 2})
    print(
        f"   the reference pass took {first['seconds']:.1f} s with the loading of the model, {first['tokens']} tokens, {first['padding']:.1%} padding"
    )
    competitors = {
        "TRL alone": lambda: ask("plain_trl", spec),
        "rc_ray": lambda: ask("rc_ray", spec),
        "TRL alone, kept": lambda: ask_as_ours("plain_trl", spec),
        "TRL with columns": lambda: ask_as_ours("plain_trl", {**spec, "columns": True}),
        "rc_ray, a core left": lambda: ask_apart("rc_ray", spec),
        "TRL with columns, a core left": lambda: ask_apart_as_ours("plain_trl", {**spec, "columns": True}),
    }
    found: dict[str, list[Spec]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, run in competitors.items():
            found[name].append(run())
            (pairs_per_s,) = speed(found[name][-1:], batch)
            print(f"   {name:<29} {pairs_per_s:7.3f} pairs/s  {found[name][-1]['peak_mib']:8.0f} MiB at most", flush=True)
    results.numbers["training"] = {"pass": first, **found}
    ours = speed(found["rc_ray"], batch)
    over_trl = ratios(ours, speed(found["TRL alone"], batch))
    results.bar(statistics.median(over_trl) >= 1.25, f"pairs per second >= 1.25 x TRL alone: {spread(over_trl)}")
    for left, where in (("", "every core"), (", a core left", "every core but one")):
        mine, theirs = (speed(found[name + left], batch) for name in ("rc_ray", "TRL with columns"))
        overhead = [1 - ratio for ratio in ratios(mine, theirs)]
        results.bar(
            statistics.median(overhead) <= 0.03, f"Ray Train costs <= 0.03 of TRL's speed on {where}: {spread(overhead, 3)}"
        )
    saved = saved_mib(found["TRL alone"], found["rc_ray"])
    size = model_mib(spec["model"])
    results.bar(
        statistics.median(saved) >= size,
        f"peak memory lower by at least the reference model, {size:.0f} MiB: {spread(saved, 0)}",
    )
    kept = found["TRL alone, kept"]
    print(
        f"      against TRL alone with memory kept: {spread(ratios(ours, speed(kept, batch)))} x its pairs per second, "
        f"{spread(saved_mib(kept, found['rc_ray']), 0)} MiB less"
    )
    apart = max(abs(a - b) for a, b in zip(found["TRL alone"][0]["losses"], found["rc_ray"][0]["losses"], strict=True))
    same_loss(results, apart, 1e-3, "losses equal those of TRL alone")


def saved_mib(theirs: list[Spec], ours: list[Spec]) -> list[float]:
    return [a["peak_mib"] - b["peak_mib"] for a, b in zip(theirs, ours, strict=True)]


def same_loss(results: Results, apart: float, most: float, text: str) -> None:
    """A bar that --quick keeps, too."""
    results.bar(apart <= most, f"{text} to {most:g}: {apart:.1e}")
    if apart > most:
        raise SystemExit(f"{text}: no, they differ by {apart}")


def model_mib(name: str) -> float:
    """Of the weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from rc_ray.models.resolve import local_model

    model = AutoModelForCausalLM.from_pretrained(local_model(name), dtype=torch.float32)
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / MIB


def part_reference(results: Results, folder: Path, data: Path, rounds: int) -> None:
    number = 70 if results.quick else 256
    spec = {"model": model_of(results, folder), "training": {"num_workers": 1, "global_batch_size": 2}}
    spec["pairs"] = pairs_file(folder, data, number, lengths(results, (20, 60)))
    print(f"\nreference: {number} pairs")
    found: dict[int, list[Spec]] = {1: [], 2: []}
    for number_of_round in range(rounds):
        for actors, kept in found.items():
            cache = str(folder / f"cache-{actors}-{number_of_round}")
            kept.append(ask("reference_pass", {**spec, "cache": cache, "actors": actors, "threads": 1}))
            last = kept[-1]
            print(
                f"   {actors} actor(s)  {last['tokens'] / last['seconds']:7.0f} tok/s  {last['seconds']:6.1f} s  {last['padding']:.1%} padding",
                flush=True,
            )
    results.numbers["reference"] = found
    faster = ratios([f["seconds"] for f in found[1]], [f["seconds"] for f in found[2]])
    results.bar(statistics.median(faster) >= 1.6, f"two actors >= 1.6 x one: {spread(faster)}")


def part_curves(results: Results, folder: Path, data: Path, rounds: int) -> None:
    steps, batch = 20, 2
    spec = {"model": model_of(results, folder), "cache": str(folder / "cache")}
    spec["pairs"] = pairs_file(folder, data, steps * batch, lengths(results, (20, 60)))
    print(f"\ncurves: {steps} steps of {batch} pairs")
    losses = []
    for workers in (1, 2):
        training = {"num_workers": workers, "global_batch_size": batch, "per_device_batch_size": 1}
        losses.append(ask("rc_ray", {**spec, "training": training})["losses"])
        print(f"   {workers} worker(s)  {' '.join(f'{loss:.4f}' for loss in losses[-1])}", flush=True)
    results.numbers["curves"] = losses
    assert len(losses[0]) == len(losses[1]) == steps
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    same_loss(results, apart, 1e-3, f"losses of one worker and two, of {steps} steps, agree")


def main() -> int:
    if is_worker(WORKERS):
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; default: all")
    default = ROOT.parent / "shared" / "data" / "hh-rlhf" / "dsp-cleaned" / "helpful.test.json"
    parser.add_argument("--data", type=Path, default=default, help="pairs, in a form that train-reward reads")
    options, output, results, rounds = begin_rounds(__doc__, parser)
    parts = {"training": part_training, "reference": part_reference, "curves": part_curves}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](results, Path(folder), options.data, rounds)
    return results.finish("bench_training", output)


if __name__ == "__main__":
    sys.exit(main())
