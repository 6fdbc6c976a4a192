"""Reward models of `rc-ray train-reward` from MiniLM on real preference pairs (hh-rlhf, helpful and harmless): three ways to learn two objectives.

    python tests/benchmarks/bench_reward_model.py [--quick] [--output DIR] [--seeds N] [--data ../shared/data/hh-rlhf/dsp-cleaned]

single      a model for each objective.
multitask   one model for both, equal weights.
more        one model for both, weights of MORE (arXiv 2312.07401).

Each trains on 400 pairs per objective in one pass, of at most 192 tokens, and is judged on at least 300 others, split by prompt, for every seed (of split, order and first
weights). Printed are means over the seeds of accuracy and expected calibration error (10 bins), with 95 % bootstrap intervals over the held-out pairs of
each seed (the trainings themselves are taken as they are), beside the rule "the longer answer is better". A bootstrap resample of an ECE is
on average a little larger than the ECE itself. With --output, trainings are kept there and not repeated when it is run again. Exit status 1 when a model of `single` is not better than chance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import ROOT, Results, machine, options_of

sys.path.insert(0, str(ROOT))
NAMES = ("helpful", "harmless")
NUM_BOOTSTRAP = 1000


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hh-rlhf" / "dsp-cleaned")
    parser.add_argument("--seeds", type=int, help="trainings of each kind; default: 3, with --quick 1")
    options, output = options_of(__doc__, parser)
    results = Results(options.quick)
    results.numbers["machine"] = machine("peft", "scipy")
    print(json.dumps(results.numbers["machine"]), flush=True)
    from rc_ray import train_reward
    from rc_ray.config import ClusterConfig
    from rc_ray.pipeline.cluster import connected

    sizes = {"num_train": 40, "num_test": 30} if options.quick else {"num_train": 400, "num_test": 320, "max_length": 192}
    files = {name: str(options.data / f"{name}.test.json") for name in NAMES}
    rows: list[dict[str, Any]] = []
    folder = output / "models"
    with connected(ClusterConfig()):
        for seed in range(options.seeds or (1 if options.quick else 3)):
            for method in ("single", "multitask", "more"):
                for sets in [{name: path} for name, path in files.items()] if method == "single" else [files]:
                    target = f"{folder}/{method}-{seed}-{'-'.join(sets)}"
                    given = {**sizes, "num_epochs": 1, "method": method, "seed": seed, "save_every_steps": 10_000}
                    found = train_reward(sets, target, given, emit=lambda _: None)
                    held_out = pq.read_table(f"{target}/held_out.parquet").to_pylist()
                    for name, result in found.sets.items():
                        d = np.array([row["difference"] for row in held_out if row["set"] == name])
                        rows.append({"method": method, "seed": seed, "set": name, "differences": d, "result": result})
                        rows[-1]["conflicts"] = found.conflicts
                    print(f"seed {seed}  {method:9}  {', '.join(sets):18}  {found.seconds:.0f} s", flush=True)
    print(f"\n{'method':10} {'objective':10} {'accuracy':24} {'ECE':24} mean weight")
    for method in ("single", "multitask", "more"):
        for name in NAMES:
            own = [row for row in rows if (row["method"], row["set"]) == (method, name)]
            cells = {key: interval([row["differences"] for row in own], key) for key in ("accuracy", "ece")}
            weights = [row["result"].mean_weight for row in own]
            weight = "" if weights[0] is None else f"{statistics.mean(weights):.2f}"
            shown = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in cells.values()]
            print(f"{method:10} {name:10} {shown[0]:24} {shown[1]:24} {weight}")
            results.numbers[f"{method}, {name}"] = cells | {"mean_weight": weights}
            if method == "single":
                results.bar(cells["accuracy"][1] > 0.5, f"single, {name}: better than chance, {shown[0]}")
    length = {name: statistics.mean(r["result"].length_accuracy for r in rows if r["set"] == name) for name in NAMES}
    print("the longer answer alone: " + ", ".join(f"{name} {share:.3f}" for name, share in length.items()))
    conflicts = [row["conflicts"] for row in rows if row["conflicts"] is not None]
    print(f"the two gradients conflicted in {statistics.mean(conflicts):.0%} of the steps of more")
    results.numbers |= {"length": length, "conflicts": conflicts}
    return results.finish("bench_reward_model", output)


def interval(seeds: list[Any], key: str) -> tuple[float, float, float]:
    """Mean over seeds, and its percentile bootstrap interval, of (n,) held-out differences of each seed."""
    from rc_ray.core.calibration import reliability

    def value(d: Any) -> float:
        return float((d > 0).mean()) if key == "accuracy" else reliability(d).ece

    rng = np.random.default_rng(0)
    means = [statistics.mean(value(d[rng.integers(0, len(d), len(d))]) for d in seeds) for _ in range(NUM_BOOTSTRAP)]
    low, high = np.quantile(means, [0.025, 0.975])
    return statistics.mean(value(d) for d in seeds), float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
