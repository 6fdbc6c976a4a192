"""Sampling: against plain vLLM and ray.data.llm, its ledger, its memory at a million prompts, and what adaptive N saves.

    python tests/benchmarks/bench_sampling.py [--quick] [--output DIR] [--only PART ...] [--rounds N]

Competitors take turns, each in a fresh process; a ratio is of one round, and printed are the median and, in brackets, the lowest
and highest. All sample the same prompts with the same engine arguments, seeds and environment (`cpu_engine_environment`, `KEPT_MEMORY`).
A span begins when the engine is loaded and ends with the last answer (of the pipeline: with the last commit).

engine    SmolLM2-135M, N = 8: tokens per second of `rc-ray sample` over one call of `vllm.LLM.generate` with all prompts, where the
          engine has every core, so that Ray's processes run on its cores, and where it leaves one of them free; then wall time
          with two reward models and selection streaming beside it over sampling alone + scoring alone.
overhead  a tiny random model, where only overhead shows, with a chunk committed every second or two: groups per second of
          `rc-ray sample`, plain vLLM, and ray.data.llm with every row eight times (the only way to get eight answers from it), all with
          the log-probs that rc_ray records. The ledger's share is the time in its commits, as if the engine stood still meanwhile:
          runs without it cannot tell 2 %, since plain vLLM alone differs by 10 % from one run to the next on two cores.
volume    recorded answers instead of an engine: groups per second, memory of the driver and the object store with 100 k and a
          million prompts (sampling_volume.png), and a half-finished run of a million prompts started again.
ledger    the record of what is done for ten million prompts: time and memory to load it.
adaptive  recorded answers of AlpacaEval: tokens and pairs of adaptive N, 2 to 8, against a fixed N of 8.

Exit status 1 when a bar is missed; with --quick, which runs everything on small data, only when results are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ALPACA, CORE_LEFT, MIB, ROOT, Results, Spec, asker, begin_rounds, is_worker, ratios, spread

from rc_ray.generation.hardware import KEPT_MEMORY

sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PARTS = ("engine", "overhead", "volume", "ledger", "adaptive")


# ---------------------------------------------------------------- competitors: each is one process, `--worker NAME SPEC`


def seeds_and_ids(spec: Spec) -> list[tuple[int, list[int]]]:
    """Seed and token ids of every prompt, as the pipeline makes them."""
    from rc_ray.config import load_config
    from rc_ray.core.ids import candidate_seed, prompt_id
    from rc_ray.generation.render import PromptRenderer
    from rc_ray.models.resolve import local_model
    from rc_ray.pipeline.prompts import read_cells, to_messages

    config = load_config(spec["config"])
    render = PromptRenderer(local_model(config.model), None, False)
    conversations = [to_messages(cell, "prompt", None) for cell in read_cells("prompts", config.prompts)]
    return [(candidate_seed(config.seed, prompt_id(messages)), render(messages)) for messages in conversations]


def engine_arguments(spec: Spec) -> tuple[str, dict[str, Any]]:
    """Model and engine arguments as `SamplingEngine` sets them on CPUs."""
    from rc_ray.config import load_config
    from rc_ray.generation.hardware import choose_dtype, cpu_engine_environment, engine_choices
    from rc_ray.models.resolve import local_model

    os.environ |= cpu_engine_environment(1)[0] | {"VLLM_LOGGING_LEVEL": "WARNING"}
    generation = load_config(spec["config"]).generation
    choices = engine_choices(generation.engine, generation.max_model_len, on_gpu=False)
    arguments: dict[str, Any] = {name: value for name, (value, _) in choices.items()} | generation.engine
    arguments |= {"dtype": choose_dtype(generation.dtype, False)[0], "max_model_len": generation.max_model_len, "seed": 0}
    return local_model(load_config(spec["config"]).model), arguments


def plain_vllm(spec: Spec) -> Spec:
    model, arguments = engine_arguments(spec)
    from vllm import LLM, SamplingParams

    engine = LLM(model, **arguments)
    work, generation = seeds_and_ids(spec), spec["config"]["generation"]
    common = {"temperature": 1.0, "max_tokens": generation["max_tokens"], "ignore_eos": False}
    common |= {"logprobs": 0} if spec.get("logprobs", True) else {}
    start = time.perf_counter()
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for _, ids in work],
        [SamplingParams(n=generation["num_candidates"], seed=seed, **common) for seed, _ in work],
        use_tqdm=False,
    )
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "groups": len(work), "tokens": sum(len(o.token_ids) for r in outputs for o in r.outputs)}


def ray_data_llm(spec: Spec) -> Spec:
    """One row per candidate, ids in, its own stages for templates, tokens and texts off, since the engine does that in the others too."""
    model, arguments = engine_arguments(spec)
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    generation = spec["config"]["generation"]
    rows = [{"ids": ids, "seed": seed + i} for seed, ids in seeds_and_ids(spec) for i in range(generation["num_candidates"])]
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=arguments,
        batch_size=32,
        concurrency=1,
        max_concurrent_batches=8,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": 1}]},
        log_engine_metrics=False,
        runtime_env={"env_vars": {k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "OMP_", "TORCHDYNAMO_"))}},
    )
    limits = {"max_tokens": generation["max_tokens"], "temperature": 1.0, "detokenize": True, "logprobs": 0}
    process = build_processor(
        config,
        preprocess=lambda row: {
            "prompt": "",
            "tokenized_prompt": row["ids"],
            "sampling_params": limits | {"seed": int(row["seed"])},
        },
        postprocess=lambda row: {
            "tokens": len(row["generated_tokens"]),
            "ended": time.time(),
            "began": time.time() - row["time_taken_llm"],
        },
    )
    done = process(ray.data.from_items(rows)).take_all()
    ray.shutdown()
    assert len(done) == len(rows)
    # From the first request of the engine on: it is loaded then.
    seconds = max(row["ended"] for row in done) - min(row["began"] for row in done)
    groups = len(rows) // generation["num_candidates"]
    return {"seconds": seconds, "groups": groups, "tokens": sum(row["tokens"] for row in done)}


def pipeline(spec: Spec) -> Spec:
    """A run, or one stage of it."""
    import ray

    from rc_ray.pipeline import actors, stages
    from rc_ray.pipeline.run import run

    if spec.get("replay"):
        from replay import replay

        replay()
    commits_log = Path(spec["config"]["output"] + "-commits")
    commits_log.write_text("")
    actors.commit_groups = timed_commit(commits_log)
    began, counts, run_groups = time.time(), {}, stages.run_groups

    def recorded(groups: Any, config: Any, plan: Any, board: Any, *how: bool) -> str | None:
        try:
            return run_groups(groups, config, plan, board, *how)
        finally:
            counts.update(ray.get(board.state.remote())[0])

    stages.run_groups = recorded
    memory = Memory() if spec.get("memory") else None
    run(spec["config"], only=spec.get("only"), emit=lambda line: print(line, file=sys.stderr, flush=True))
    since_boot = time.time() - time.monotonic()
    # Reward models are ready while the engine is still being loaded.
    ready = (counts["sample"] if "sample" in counts else counts["score"]).ready_s + since_boot
    commits = [commit for commit in commit_times(Path(spec["config"]["output"])) if commit > began]
    ended = max([*commits, *(stage.updated_s + since_boot for stage in counts.values())])
    found = {"seconds": ended - ready, "groups": max(stage.done - stage.resumed for stage in counts.values())}
    found |= {
        "tokens": counts["sample"].tokens if "sample" in counts else 0,
        "first_commit": min(commits, default=began) - began,
        "commit_s": sum(map(float, commits_log.read_text().split())),
    }
    return found | ({"memory": memory.stop()} if memory else {})


def timed_commit(log: Path) -> Callable[..., Any]:
    """`commit_groups` that notes its seconds in a file; it is sent to the workers as it stands, and finds the plain one there."""

    def commit(block: Any, **how: Any) -> Any:
        from rc_ray.pipeline.actors import commit_groups

        start = time.perf_counter()
        found = commit_groups(block, **how)
        with log.open("a") as file:
            file.write(f"{time.perf_counter() - start}\n")
        return found

    return commit


def commit_times(folder: Path) -> list[float]:
    """When each chunk of each stage was committed."""
    stages = [folder / "ledger" / stage for stage in ("sample", "score", "select")]
    return [
        entry.stat().st_mtime
        for stage in stages
        if stage.exists()
        for entry in os.scandir(stage)
        if entry.name.startswith("chunk-")
    ]


class Memory:
    """Looks every second at the memory of this process (the driver) and of the object store."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        import psutil
        import ray
        from ray._private.internal_api import node_stats

        start, process = time.monotonic(), psutil.Process()
        while not self._stopped.wait(1):
            store = 0.0
            with contextlib.suppress(Exception):  # Ray is not there yet, or no longer
                assert ray.is_initialized()
                node = ray.nodes()[0]
                stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
                store = (stats.object_store_bytes_used + stats.spilled_bytes_total) / MIB
            self._samples.append((time.monotonic() - start, process.memory_info().rss / MIB, store))

    def stop(self) -> Spec:
        self._stopped.set()
        self._thread.join()
        return {"driver": max(s[1] for s in self._samples), "store": max(s[2] for s in self._samples), "samples": self._samples}


def ledger_load(spec: Spec) -> Spec:
    """What a driver reads of a ledger before it begins."""
    from rc_ray.ledger.ledger import Ledger
    from rc_ray.ledger.storage import Folder

    ledger = Ledger(Folder.at(spec["folder"]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    done = ledger.done("sample")
    seconds, all_counts = time.perf_counter() - start, ledger.totals("sample")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds, "totals_seconds": time.perf_counter() - start - seconds, "chunks": len(done),
        "groups": all_counts["groups"], "peak": peak * 1024 / MIB, "grown": (peak - before) * 1024 / MIB,
    }  # fmt: skip


WORKERS: dict[str, Callable[[Spec], Spec]] = {f.__name__: f for f in (plain_vllm, ray_data_llm, pipeline, ledger_load)}


ask, ask_as_ours = asker(__file__), asker(__file__, KEPT_MEMORY)
ask_apart, ask_apart_as_ours = asker(__file__, CORE_LEFT), asker(__file__, CORE_LEFT | KEPT_MEMORY)


def rounds_of(number: int, competitors: dict[str, Callable[[], Spec]]) -> dict[str, list[Spec]]:
    found: dict[str, list[Spec]] = {name: [] for name in competitors}
    for _ in range(number):
        for name, run in competitors.items():
            found[name].append(run())
            last = found[name][-1]
            print(f"   {name:<28} {last['groups']:>7} groups  {last['tokens']:>9} tokens  {last['seconds']:8.1f} s", flush=True)
    return found


def rate(found: list[Spec], what: str) -> list[float]:
    return [each[what] / each["seconds"] for each in found]


# ---------------------------------------------------------------- parts


def prompts_file(folder: Path, number: int) -> Path:
    """Prompts of AlpacaEval where they are there, else made up; each is different."""
    path = folder / f"prompts-{number}.jsonl"
    texts = ["Explain in a few words what this is about."]
    if ALPACA.exists():
        known = [json.loads(line)["instruction"] for line in (ALPACA / "prompts.jsonl").read_text().splitlines()]
        texts = [text for text in known if len(text) < 300]
    path.write_text("".join(json.dumps({"prompt": f"{texts[i % len(texts)]} ({i})"}) + "\n" for i in range(number)))
    return path


class Runs:
    """Configurations of one part; every run gets a directory of its own."""

    def __init__(self, folder: Path, base: Spec) -> None:
        self._folder, self._base, self._number = folder, base, 0

    def config(self, **changes: Any) -> Spec:
        self._number += 1
        merged = {**self._base, "output": str(self._folder / f"run-{self._number}")}
        for key, value in changes.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        return merged


RULES = {name: {"kind": "rule", "function": f"replay:{name}"} for name in ("brevity", "checksum")}
UNTRAINED = {"training": {"enabled": False}, "selection": {"allow_truncated_winner": True}}


def part_engine(results: Results, folder: Path, output: Path, rounds: int) -> None:
    number, tokens = (4, 8) if results.quick else (64, 64)
    rewards = {name: {"kind": "classifier", "model": str(classifier(folder, seed))} for seed, name in enumerate(("a", "b"))}
    runs = Runs(folder, {
        "model": "embedded:smollm2-135m",
        "prompts": {"path": str(prompts_file(folder, number))},
        "generation": {"num_candidates": 8, "max_tokens": tokens, "max_model_len": 512},
        "rewards": rewards,
        "cluster": {"chunk_size": 4},
        **UNTRAINED,
    })  # fmt: skip
    print(f"\nengine: SmolLM2-135M, {number} prompts x 8 answers of at most {tokens} tokens")
    sampled: list[Spec] = []

    def alone() -> Spec:
        sampled.append(runs.config())
        return ask("pipeline", {"config": sampled[-1], "only": "sample"})

    found = rounds_of(rounds, {
        "plain vLLM": lambda: ask_as_ours("plain_vllm", {"config": runs.config()}),
        "rc_ray, sampling alone": alone,
        "rc_ray, scoring alone": lambda: ask("pipeline", {"config": sampled[-1], "only": "score"}),
        "rc_ray, all at once": lambda: ask("pipeline", {"config": runs.config()}),
        "plain vLLM, a core left": lambda: ask_apart_as_ours("plain_vllm", {"config": runs.config()}),
        "rc_ray, a core left": lambda: ask_apart("pipeline", {"config": runs.config(), "only": "sample"}),
    })  # fmt: skip
    results.numbers["engine"] = found
    for ours, plain, where in (
        ("rc_ray, sampling alone", "plain vLLM", "every core"),
        ("rc_ray, a core left", "plain vLLM, a core left", "every core but one"),
    ):
        speed = ratios(rate(found[ours], "tokens"), rate(found[plain], "tokens"))
        results.bar(statistics.median(speed) >= 0.97, f"tokens per second >= 0.97 of plain vLLM on {where}: {spread(speed)}")
    apart = zip(found["rc_ray, sampling alone"], found["rc_ray, scoring alone"], strict=True)
    wall = ratios([each["seconds"] for each in found["rc_ray, all at once"]], [a["seconds"] + b["seconds"] for a, b in apart])
    results.bar(statistics.median(wall) <= 1.05, f"wall time with rewards <= 1.05 of sampling + scoring alone: {spread(wall)}")


def classifier(folder: Path, seed: int) -> Path:
    """MiniLM with a random head: as much work as a trained reward of its size."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rc_ray.models.resolve import local_model

    path = folder / f"classifier-{seed}"
    torch.manual_seed(seed)
    base = local_model("embedded:minilm-l6")
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return path


def tiny_model(folder: Path) -> Path:
    from tests.conftest import make_llama

    return make_llama(folder / "tiny", seed=0)


def part_overhead(results: Results, folder: Path, output: Path, rounds: int) -> None:
    number = 40 if results.quick else 1600
    runs = Runs(folder, {
        "model": str(tiny_model(folder)),
        "prompts": {"path": str(prompts_file(folder, number))},
        "generation": {"num_candidates": 8, "max_tokens": 24, "max_model_len": 480, "dtype": "float32"},
        "rewards": RULES,
        "cluster": {"chunk_size": 64},
        **UNTRAINED,
    })  # fmt: skip
    print(f"\noverhead: a tiny model, {number} prompts x 8 answers of at most 24 tokens")
    found = rounds_of(rounds, {
        "plain vLLM": lambda: ask_as_ours("plain_vllm", {"config": runs.config()}),
        "plain vLLM, no log-probs": lambda: ask_as_ours("plain_vllm", {"config": runs.config(), "logprobs": False}),
        "rc_ray": lambda: ask("pipeline", {"config": runs.config(), "only": "sample"}),
        "ray.data.llm": lambda: ask_as_ours("ray_data_llm", {"config": runs.config()}),
    })  # fmt: skip
    results.numbers["overhead"] = found
    ours = rate(found["rc_ray"], "groups")
    peer = ratios(ours, rate(found["ray.data.llm"], "groups"))
    results.bar(statistics.median(peer) >= 2, f"groups per second >= 2 x ray.data.llm: {spread(peer)}")
    plain = ratios(ours, rate(found["plain vLLM"], "groups"))
    results.bar(statistics.median(plain) >= 0.9, f"groups per second >= 0.9 of plain vLLM: {spread(plain)}")
    bare = ratios(ours, rate(found["plain vLLM, no log-probs"], "groups"))
    print(f"      of plain vLLM without the log-probs that rc_ray records: {spread(bare)}")
    ledger = rate(found["rc_ray"], "commit_s")
    results.bar(statistics.median(ledger) <= 0.02, f"the ledger takes <= 0.02 of the throughput: {spread(ledger, 4)}")


def part_volume(results: Results, folder: Path, output: Path, rounds: int) -> None:
    sizes = (2_000, 4_000) if results.quick else (100_000, 1_000_000)
    model = tiny_model(folder)
    print(f"\nvolume: recorded answers, 4 per prompt, two rule rewards; {sizes[0]:,} and {sizes[1]:,} prompts")
    found, configs = [], []
    for size in sizes:
        path = folder / f"volume-{size}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(size)))
        configs.append({
            "model": str(model),
            "output": str(folder / f"volume-{size}"),
            "prompts": {"path": str(path)},
            "generation": {"num_candidates": 4, "max_tokens": 64, "max_model_len": 480},
            "rewards": RULES,
            "cluster": {"chunk_size": 500, "progress_interval_s": 30},
            **UNTRAINED,
        })  # fmt: skip
        found.append(ask("pipeline", {"config": configs[-1], "replay": True, "memory": True}))
        last, memory = found[-1], found[-1]["memory"]
        print(
            f"   {size:>9,} prompts: {last['groups'] / last['seconds']:,.0f} groups/s; at most {memory['driver']:,.0f} MiB in the driver, "
            f"{memory['store']:,.0f} MiB in the object store",
            flush=True,
        )
    results.numbers["volume"] = found
    for what in ("driver", "store"):
        small, large = (max(1.0, each["memory"][what]) for each in found)
        results.bar(
            large <= 1.2 * small, f"{what} memory within 1.2 x: {large / small:.2f} ({small:,.0f} and {large:,.0f} MiB)"
        )
    plot(found, sizes, configs, output / "sampling_volume.png")
    run = Path(configs[-1]["output"])
    chunks = sorted(file.stem for file in (run / "ledger" / "sample").glob("chunk-*.json"))
    for chunk in chunks[len(chunks) // 2 :]:
        for stage in ("sample", "score", "select"):
            (run / "ledger" / stage / f"{chunk}.json").unlink()
        for kind in ("candidates", "pairs", "drops"):
            (run / kind / f"{chunk}.parquet").unlink()
    # Ended by a budget soon after it has begun; it need not do the other half.
    tokens = found[-1]["tokens"] // 2 + found[-1]["tokens"] // 20
    again = ask("pipeline", {"config": {**configs[-1], "budget": {"max_generated_tokens": tokens}}, "replay": True})
    results.numbers["restart"] = again
    results.bar(
        again["first_commit"] < 60 and 0 < again["groups"] <= sizes[1] // 2,
        f"a half-finished run of {sizes[1]:,} prompts has committed new work in < 60 s: {again['first_commit']:.1f} s",
    )


def plot(found: list[Spec], sizes: tuple[int, ...], configs: list[Spec], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(8, 9), constrained_layout=True)
    for run, size, config in zip(found, sizes, configs, strict=True):
        label = f"{size:,} prompts"
        times = sorted(entry.stat().st_mtime for entry in os.scandir(Path(config["output"]) / "ledger" / "score"))
        window = max(2, len(times) // 50)
        starts = range(0, len(times) - window, window)
        speed = [window * config["cluster"]["chunk_size"] / (times[i + window] - times[i]) for i in starts]
        axes[0].plot([(i + window) / len(times) for i in starts], speed, label=label)
        samples = run["memory"]["samples"]
        for axis, what in ((axes[1], 1), (axes[2], 2)):
            axis.plot([s[0] / samples[-1][0] for s in samples], [s[what] for s in samples], label=label)
    for axis, text in zip(axes, ("groups per second", "driver, MiB", "object store, MiB"), strict=True):
        axis.set(ylabel=text, ylim=(0, None), xlabel="share of the run")
        axis.legend()
    figure.savefig(path, dpi=120)


def part_ledger(results: Results, folder: Path, output: Path, rounds: int) -> None:
    prompts, size = (100_000 if results.quick else 10_000_000), 256
    records = folder / "ledger" / "sample"
    records.mkdir(parents=True)
    chunks = math.ceil(prompts / size)
    record = json.dumps({"groups": size, "candidates": 8 * size, "tokens": 800 * size, "truncated": 3, "failed": 0})
    for chunk in range(chunks):
        (records / f"chunk-{chunk:06d}.json").write_text(record)
    found = ask("ledger_load", {"folder": str(folder / "ledger")})
    assert (found["chunks"], found["groups"]) == (chunks, chunks * size)
    results.numbers["ledger"] = found
    print(f"\nledger: {prompts:,} prompts in {chunks:,} chunks; all counts besides in {found['totals_seconds']:.1f} s")
    text = f"{found['seconds']:.2f} s, {found['peak']:,.0f} MiB, of them {found['grown']:,.0f} for the record"
    results.bar(found["seconds"] < 60 and found["peak"] < 2048, f"what is done is loaded in < 60 s and 2 GiB: {text}")


def part_adaptive(results: Results, folder: Path, output: Path, rounds: int) -> None:
    if not ALPACA.exists():
        raise SystemExit(f"adaptive: the recorded answers are not there ({ALPACA}); leave the part out with --only")
    from replay import write_record

    model = tiny_model(folder)
    prompts = [json.loads(line)["instruction"] for line in (ALPACA / "prompts.jsonl").read_text().splitlines()]
    pool: dict[str, dict[str, float]] = {}
    with gzip.open(ALPACA / "pool_weighted_gpt4turbo.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            if row["generator"] not in (
                "NullModel",
                "gpt4_gamed",
                "gpt4_1106_preview",
            ):  # two game the judge, one is its reference
                p = min(max(row["pref_vs_gpt4_1106"] - 1, 1e-12), 1 - 1e-12)
                pool.setdefault(prompts[row["pid"]], {})[row["output"]] = math.log(p / (1 - p))
    draw = random.Random(0)
    chosen = dict(list(pool.items())[: 64 if results.quick else None])
    write_record(model, {prompt: draw.sample(list(answers.items()), 8) for prompt, answers in chosen.items()})
    path = folder / "recorded.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in chosen))
    runs = Runs(folder, {
        "model": str(model),
        "prompts": {"path": str(path)},
        "generation": {"num_candidates": 8, "max_tokens": 64, "max_model_len": 480},
        "rewards": {
            "preference": {"kind": "rule", "function": "replay:preference", "args": {"model": str(model)}},
            "brevity": {"kind": "rule", "function": "replay:brevity"},
        },
        **UNTRAINED,
    })  # fmt: skip
    print(f"\nadaptive: {len(chosen)} prompts of AlpacaEval with answers of other models, preference and brevity")
    outcome = {}
    for name, generation in {"fixed": {}, "adaptive": {"num_candidates": 2, "max_candidates": 8}}.items():
        config = runs.config(generation=generation)
        found = ask("pipeline", {"config": config, "replay": True})
        identity = json.loads((Path(config["output"]) / "metrics.json").read_text())["identity"]
        outcome[name] = {"tokens": found["tokens"], "pairs": identity["paired"]}
        print(f"   {name:<9} {found['tokens']:>9} tokens (a quarter of the characters), {identity['paired']} pairs")
    results.numbers["adaptive"] = outcome
    saved = 1 - outcome["adaptive"]["tokens"] / outcome["fixed"]["tokens"]
    kept = outcome["adaptive"]["pairs"] / outcome["fixed"]["pairs"]
    results.bar(
        saved >= 0.3 and kept >= 0.99,
        f"adaptive N saves >= 0.3 of the tokens at >= 0.99 of the pairs: {saved:.3f} at {kept:.3f}",
    )


def main() -> int:
    if is_worker(WORKERS):
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; default: all")
    options, output, results, rounds = begin_rounds(__doc__, parser)
    parts = {
        "engine": part_engine,
        "overhead": part_overhead,
        "volume": part_volume,
        "ledger": part_ledger,
        "adaptive": part_adaptive,
    }
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](results, Path(folder), output, rounds)
    return results.finish("bench_sampling", output)


if __name__ == "__main__":
    sys.exit(main())
