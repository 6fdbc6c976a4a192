"""Speed and memory of selection: against DuckDB, Polars, NumPy, Numba, plain Python on arrays, and bare pyarrow on files.

    python tests/benchmarks/bench_selection.py [--quick] [--output DIR]

Everything runs on one thread. What is compared takes turns within one run, and a ratio is of one round; printed are the median
and, in brackets, the lowest and highest. Before anything is timed, each competitor must return the very pairs that rc_ray
returns. Loading data into a competitor is not timed.

1. `rcs` on arrays: the strict RC pair with the largest sum of differences over scales. Of several ways to write the same
   self-join for DuckDB or Polars the fastest counts; some leave open which of two equal gaps wins, which these data do not
   have. "DuckDB unrolled" is no join but generated SQL with one expression per pair over one row per group: for small N only.
2. Every strategy with one pair per group, relative to `rcs`.
3. Microseconds per group against N and K: selection_cost.png, selection_cost.csv.
4. `rc-ray select` on a Parquet file, as a process, against a pyarrow script that copies the columns that select reads. Peak
   memory of both file sizes, and of `--report` over a million groups. (Linux only: what the system reports differs elsewhere.)

Exit status 1 when a bar is missed; with --quick, which runs everything on small data, only when results are wrong.
"""

from __future__ import annotations

import os

os.environ |= {"POLARS_MAX_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}

import csv
import gzip
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from operator import gt
from pathlib import Path
from typing import Any

import duckdb
import matplotlib
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from common import ALPACA, MIB, ROOT, Results, machine, options_of, ratios, spread
from numba import njit
from numpy.typing import NDArray

from rc_ray.config import SelectionConfig
from rc_ray.core.selection import fit_array, select_indices

matplotlib.use("agg")
from matplotlib import pyplot as plt

Array = NDArray[np.float32]
Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]  # group, winner * N + loser
Calls = dict[str, tuple[Callable[[], Any], int]]  # function, groups in it


def in_turns(calls: Calls, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Groups per second of each call, one after the other in each round, repeated for `seconds`."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (function, groups) in calls.items():
            count, start = 0, time.perf_counter()
            while count == 0 or time.perf_counter() - start < seconds:
                function()
                count += 1
            rates[name].append(groups * count / (time.perf_counter() - start))
    return rates


def gaussian(groups: int, n: int, k: int, seed: int = 0, correlation: float = 0.3) -> Array:
    rng = np.random.default_rng(seed)
    shared, own = rng.standard_normal((groups, n, 1), np.float32), rng.standard_normal((groups, n, k), np.float32)
    return (np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own).astype(np.float32)


# ---------------------------------------------------------------- part 1: competitors on arrays


def plain_python(groups: list[list[list[float]]], scale: list[float]) -> Pairs:
    codes = np.full(len(groups), -1)
    for g, rewards in enumerate(groups):
        scores = [sum(x / s for x, s in zip(row, scale, strict=True)) for row in rewards]
        best = 0.0
        for w, (row, score) in enumerate(zip(rewards, scores, strict=True)):
            for i, other in enumerate(rewards):
                if score - scores[i] > best and all(map(gt, row, other)):
                    best, codes[g] = score - scores[i], w * len(rewards) + i
    return as_pairs(codes)


def as_pairs(codes: NDArray[np.int64]) -> Pairs:
    """From one code per group, -1 where it has no pair."""
    return np.flatnonzero(codes >= 0), codes[codes >= 0]


@njit
def double_loop(rewards: Any, scale: Any) -> Any:
    codes = np.full(rewards.shape[0], -1, dtype=np.int64)
    for g in range(rewards.shape[0]):
        best = 0.0
        for w in range(rewards.shape[1]):
            for i in range(rewards.shape[1]):
                gap, consistent = 0.0, True
                for k in range(scale.size):
                    difference = np.float64(rewards[g, w, k]) - np.float64(rewards[g, i, k])
                    if not difference > 0:
                        consistent = False
                        break
                    gap += difference / scale[k]
                if consistent and gap > best:
                    best, codes[g] = gap, w * rewards.shape[1] + i
    return codes


def numpy_blocks(rewards: Array, scale: list[float]) -> Pairs:
    """All pairs of a block of groups at once, as many as stay in the cache."""
    block, codes = max(1, (1 << 17) // rewards.shape[1] ** 2), []
    for start in range(0, len(rewards), block):
        part = rewards[start : start + block]
        score = part.astype(np.float64) @ (1 / np.array(scale))
        consistent = part[:, :, None, 0] > part[:, None, :, 0]
        for k in range(1, len(scale)):
            consistent &= part[:, :, None, k] > part[:, None, :, k]
        gap = np.where(consistent, score[:, :, None] - score[:, None, :], 0.0).reshape(len(part), -1)
        code = gap.argmax(axis=1)
        codes.append(np.where(gap[np.arange(len(part)), code] > 0, code, -1))
    return as_pairs(np.concatenate(codes))


def long_table(rewards: Array) -> pa.Table:
    groups, n, k = rewards.shape
    columns = {f"r{m}": np.ascontiguousarray(rewards[:, :, m]).ravel() for m in range(k)}
    g, i = np.arange(groups, dtype=np.int32), np.arange(n, dtype=np.uint8)
    return pa.table({"g": np.repeat(g, n), "i": np.tile(i, groups), **columns})


def duckdb_forms(rewards: Array, scale: list[float]) -> dict[str, Callable[[], Pairs]]:
    """Self-joins, and for small N the unrolled form."""
    groups, n, k = rewards.shape
    connection = duckdb.connect()
    connection.execute("SET threads = 1")
    connection.register("long_arrow", long_table(rewards))
    connection.execute("CREATE TABLE t AS FROM long_arrow")
    a, b = (" + ".join(f"{side}.r{m}::DOUBLE / {scale[m]!r}" for m in range(k)) for side in "ab")
    connection.execute(f"CREATE VIEW scored AS SELECT *, {a} AS s FROM t a")
    on = f"b ON a.g = b.g AND {' AND '.join(f'a.r{m} > b.r{m}' for m in range(k))}"
    code = f"a.i::USMALLINT * {n} + b.i"
    rank = "row_number() OVER (PARTITION BY a.g ORDER BY a.s - b.s DESC, a.i, b.i)"
    queries = {
        "join, arg_max": f"SELECT a.g AS g, arg_max({code}, a.s - b.s) AS code FROM scored a JOIN scored {on} GROUP BY a.g",
        "join, arg_max, late scores": f"SELECT a.g AS g, arg_max({code}, ({a}) - ({b})) code FROM t a JOIN t {on} GROUP BY a.g",
        "join, QUALIFY": f"SELECT a.g AS g, {code} AS code FROM scored a JOIN scored {on} QUALIFY {rank} = 1",
    }
    ordered = [(w, i) for w in range(n) for i in range(n) if w != i]
    if n <= 8:
        wide = {f"r{m}_{i}": np.ascontiguousarray(rewards[:, i, m]) for i in range(n) for m in range(k)}
        connection.register("wide_arrow", pa.table({"g": np.arange(groups, dtype=np.int32), **wide}))
        connection.execute("CREATE TABLE wide AS FROM wide_arrow")
        scores = ", ".join(" + ".join(f"r{m}_{i}::DOUBLE / {scale[m]!r}" for m in range(k)) + f" AS s{i}" for i in range(n))
        above = {(w, i): " AND ".join(f"r{m}_{w} > r{m}_{i}" for m in range(k)) for w, i in ordered}
        gaps = ", ".join(f"if({above[w, i]}, s{w} - s{i}, -1)" for w, i in ordered)
        pairs = f"SELECT g, [{gaps}] AS gaps FROM (SELECT *, {scores} FROM wide)"
        queries["unrolled"] = (
            f"SELECT g, list_position(gaps, best) AS code FROM (SELECT *, list_max(gaps) AS best FROM ({pairs})) WHERE best > 0"
        )
    codes = np.array([0] + [w * n + i for w, i in ordered])  # list positions count from 1

    def run(name: str) -> Pairs:
        table = connection.sql(queries[name]).to_arrow_table()
        g, code = table["g"].to_numpy(), table["code"].to_numpy()
        return g, codes[code] if name == "unrolled" else code

    return {f"DuckDB {name}": partial(run, name) for name in queries}


def polars_forms(rewards: Array, scale: list[float]) -> dict[str, Callable[[], Pairs]]:
    frame = pl.from_arrow(long_table(rewards)).lazy()
    scored = frame.with_columns(s=pl.sum_horizontal([pl.col(f"r{m}").cast(pl.Float64) / s for m, s in enumerate(scale)]))
    consistent = [pl.col(f"r{m}") > pl.col(f"r{m}_right") for m in range(len(scale))]
    code = (pl.col("i").cast(pl.UInt16) * rewards.shape[1] + pl.col("i_right")).alias("code")
    gap = (pl.col("s") - pl.col("s_right")).alias("gap")
    join = scored.join(scored, on="g").filter(*consistent)
    join_where = scored.join_where(scored, pl.col("g") == pl.col("g_right"), *consistent)
    by_max, by_arg_max = pl.col("code").max_by("gap"), pl.col("code").get(pl.col("gap").arg_max())

    def run(joined: pl.LazyFrame, best: pl.Expr) -> Pairs:
        table = joined.select("g", code, gap).group_by("g").agg(best).collect(engine="streaming")
        return table["g"].to_numpy(), table["code"].to_numpy()

    return {
        "Polars join, max_by": partial(run, join, by_max),
        "Polars join, arg_max": partial(run, join, by_arg_max),
        "Polars join_where, max_by": partial(run, join_where, by_max),
    }


def same_pairs(name: str, found: Pairs, expected: Pairs) -> None:
    order = np.argsort(found[0], kind="stable")
    assert np.array_equal(found[0][order], expected[0]), f"{name}: pairs for other groups than rc_ray"
    assert np.array_equal(found[1][order], expected[1]), f"{name}: other pairs than rc_ray"


def part_1(results: Results, n: int, k: int, groups: int, bound: int | None) -> None:
    """With a bar on correlated rewards, without one on the worst case, where no group has a pair."""
    rewards = gaussian(groups // (20 if results.quick else 1), n, k)
    if bound is None:
        rewards[:, :, 1] = -rewards[:, :, 0]
    scale = rewards.std(axis=(0, 1), dtype=np.float64).tolist()
    config = SelectionConfig(scale={str(m): s for m, s in enumerate(scale)})
    found = select_indices(rewards, config)
    expected = found.group, found.winner * n + found.loser
    few = rewards[: len(rewards) // 50].tolist()
    forms: Calls = {
        "plain Python": (lambda: plain_python(few, scale), len(few)),
        "Numba, double loop": (lambda: as_pairs(double_loop(rewards, np.array(scale))), len(rewards)),
        "NumPy, pairs of a block": (lambda: numpy_blocks(rewards, scale), len(rewards)),
        **{name: (form, len(rewards)) for name, form in (duckdb_forms(rewards, scale) | polars_forms(rewards, scale)).items()},
    }
    taken = {}
    for name, (form, size) in forms.items():
        same_pairs(name, form(), (expected[0][expected[0] < size], expected[1][expected[0] < size]))
        start = time.perf_counter()
        form()
        taken[name] = time.perf_counter() - start
    best = {}
    for tool in ("DuckDB join", "Polars join"):
        joins = [name for name in forms if name.startswith(tool)]
        best[tool] = min(joins, key=lambda name: taken[name])
        forms = {name: form for name, form in forms.items() if name not in joins or name == best[tool]}
    forms = {"rc_ray": (partial(select_indices, rewards, config), len(rewards))} | forms
    rates = in_turns(forms, *((3, 0.02) if results.quick else (7, 0.3)))
    title = f"N={n}, K={k}, {'correlation 0.3' if bound else 'contradicting objectives'}"
    print(f"\n1. rcs on arrays, {title}: {len(rewards):,} groups, {len(found.group) / len(rewards):.1%} with a pair")
    for name, rate in rates.items():
        print(f"   {name:38} {spread(rate, 0):>36} groups/s   rc_ray: {spread(ratios(rates['rc_ray'], rate), 1)} times as fast")
    results.numbers[f"rcs {title}, groups_per_s"] = rates
    if bound:
        ratio = statistics.median(ratios(rates["rc_ray"], rates[best["DuckDB join"]]))
        results.bar(ratio >= bound, f">= {bound}x DuckDB's self-join at N={n}, K={k}: {ratio:.1f}")


# ---------------------------------------------------------------- parts 2 and 3: strategies, cost


def part_2(results: Results) -> None:
    names = ("0", "1", "2")
    options: dict[str, dict[str, Any]] = {
        "rcs": {},
        **{f"rcs, gap {gap}": {"gap": gap} for gap in ("sum", "min", "product", "primary:0")},
        "rcs, scale group (no bar)": {"scale": "group"},
        "rcs, margins (no bar)": {"margins": dict.fromkeys(names, 0.1)},
        "rcs, weak": {"consistency": "weak"},
        "rcs, lexicographic": {"consistency": "lexicographic", "primary": "0"},
        "rcs, 2 of 3 agreeing": {"min_agreeing": 2},
        **{name: {"strategy": name} for name in ("best_worst", "best_random", "sweet_spot", "pareto", "lsc")},
        "map": {"strategy": "map", "targets": dict.fromkeys(names, 0.3)},
    }
    rewards = gaussian(5_000 if results.quick else 200_000, 8, 3)
    calls: Calls = {}
    for name, given in options.items():
        config = SelectionConfig(**given)
        fitted = fit_array(rewards, list(names), config)
        found = select_indices(rewards, config, fitted)
        assert len(np.unique(found.group)) == len(found.group), f"{name}: more than one pair per group"
        calls[name] = partial(select_indices, rewards, config, fitted), len(rewards)
    rates = in_turns(calls, *((3, 0.01) if results.quick else (7, 0.15)))
    print("\n2. strategies with one pair per group, N=8, K=3 (measuring the data's scale is not part of the time)")
    for name, rate in rates.items():
        print(f"   {name:26} {1e6 / statistics.median(rate):6.3f} us/group   {spread(ratios(rates['rcs'], rate))} x rcs")
    results.numbers["strategies groups_per_s"] = rates
    slow = {name: statistics.median(ratios(rates["rcs"], rate)) for name, rate in rates.items() if "no bar" not in name}
    worst = max(slow, key=lambda name: slow[name])
    results.bar(slow[worst] <= 3, f"within 3x of rcs: the slowest is {worst} with {slow[worst]:.2f}")


def part_3(results: Results, output: Path) -> None:
    print("\n3. microseconds per group: rcs / best_worst / pareto (selection_cost.csv, selection_cost.png)")
    strategies = ("rcs", "best_worst", "pareto")
    rows = []
    for axis, n, k in [("N", 2**e, 3) for e in range(1, 9)] + [("K", 8, k) for k in range(1, 9)]:
        rewards = gaussian((20_000 if results.quick else 400_000) // n, n, k)
        calls: Calls = {}
        for name in strategies:
            config = SelectionConfig(strategy=name, scale={str(m): 1.0 for m in range(k)})
            calls[name] = partial(select_indices, rewards, config), len(rewards)
        in_turns(calls, 1, 0)
        rates = in_turns(calls, *((3, 0) if results.quick else (5, 0.05)))
        us = {name: sorted(round(1e6 / rate, 4) for rate in rates[name]) for name in strategies}
        rows += [(axis, n, k, name, statistics.median(us[name]), us[name][0], us[name][-1]) for name in strategies]
        print(f"   N={n:<4} K={k}  {' / '.join(f'{statistics.median(us[name]):.3f}' for name in strategies)}")
    header = ("against", "N", "K", "strategy", "us_per_group", "lowest", "highest")
    with (output / "selection_cost.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    results.numbers["cost"] = [dict(zip(header, row, strict=True)) for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for plot, name in itertools.product((0, 1), strategies):
        of = [row for row in rows if row[0] == "NK"[plot] and row[3] == name]
        x = [row[1 + plot] for row in of]
        axes[plot].plot(x, [row[4] for row in of], marker="o", label=name)
        axes[plot].fill_between(x, [row[5] for row in of], [row[6] for row in of], alpha=0.2)
    axes[0].set(xlabel="candidates N (K = 3)", ylabel="microseconds per group", yscale="log")
    axes[0].set_xscale("log", base=2)
    axes[1].set(xlabel="objectives K (N = 8)", ylim=(0, None))
    for plot in axes:
        plot.grid(alpha=0.3)
        plot.legend()
    figure.suptitle("Cost of selection on one thread: median of the rounds, and from the lowest to the highest")
    figure.savefig(output / "selection_cost.png", dpi=120)


# ---------------------------------------------------------------- part 4: files

# Runs a command and prints its wall time, peak memory and exit status; small itself, as a child starts with its parent's peak.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
wall, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"wall": wall, "peak": peak, "code": done.returncode, "error": done.stderr.decode()[-2000:]}))
"""
# Copies the columns that select reads; with "two", of the eight answers to each prompt two, which is what select writes.
COPY = """
import sys
import pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq
source, target, answers, *columns = sys.argv[1:]
writer = None
for batch in pq.ParquetFile(source).iter_batches(batch_size=4096, columns=columns):
    if answers == "two":
        kept = {name: batch.column(name) for name in columns if name != "candidates"}
        kept |= {f"answer{i}": pc.list_element(batch.column("candidates"), i) for i in range(2)}
        batch = pa.record_batch(list(kept.values()), list(kept))
    writer = writer or pq.ParquetWriter(target, batch.schema, compression="zstd")
    writer.write_batch(batch)
writer.close()
"""
REWARDS = ("reward.helpful", "reward.honest", "reward.brief")
Pool = list[tuple[str, list[str]]]


def text_pool() -> Pool:
    """Prompts with their answers: those of AlpacaEval's models where the data are there, else words drawn at random."""
    if ALPACA.exists():
        prompts = [json.loads(line)["instruction"] for line in (ALPACA / "prompts.jsonl").read_text().splitlines()]
        answers: dict[int, list[str]] = {}
        with gzip.open(ALPACA / "pool_weighted_gpt4turbo.jsonl.gz", "rt") as file:
            for row in map(json.loads, file):
                answers.setdefault(row["pid"], []).append(row["output"])
        return [(prompts[pid], texts) for pid, texts in answers.items()]
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 10))) for _ in range(5000)])
    texts = [" ".join(words[(rng.pareto(1, n) * 50).astype(int) % 5000]) for n in rng.integers(40, 250, 5000)]
    return [(texts[i][:80], texts[i : i + 16]) for i in range(0, 4984, 16)]


def scored(pool: Pool, rewards: Array, longest: int | None = None) -> pa.Table:
    """Groups of 8 answers from the pool, each turned round at a random place and numbered, so that none are the same text."""
    rng = np.random.default_rng(1)
    prompts, texts = [], []
    for g, (first, turns) in enumerate(zip(rng.random(len(rewards)), rng.random((len(rewards), 8)), strict=True)):
        prompt, answers = pool[g % len(pool)]
        prompts.append(f"{prompt[:longest]} ({g})")
        for i, turn in enumerate(turns.tolist()):
            text = answers[(int(first * len(answers)) + i) % len(answers)]
            at = int(turn * len(text))
            texts.append(f"{f'{text[at:]} {text[:at]}'[:longest]} ({i})")

    def lists(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.linspace(0, len(values), len(rewards) + 1).astype(np.int32)), values)

    def structs(**fields: list[str]) -> pa.Array:
        return lists(pa.StructArray.from_arrays([pa.array(values) for values in fields.values()], list(fields)))

    return pa.table(
        {
            "prompt_id": [f"{g:032x}" for g in range(len(rewards))],
            "prompt": structs(role=["user"] * len(prompts), content=prompts),
            "candidates": structs(text=texts, finish_reason=["stop"] * len(texts)),
            **{name: lists(pa.array(rewards[:, :, m].ravel())) for m, name in enumerate(REWARDS)},
        }
    )


def write(path: Path, table: pa.Table) -> None:
    """As one row group, the most difficult case for a reader's memory."""
    pq.write_table(table, path, compression="zstd", row_group_size=table.num_rows)
    size, disk = table.nbytes / MIB, path.stat().st_size / MIB
    print(f"   {path.name}: {table.num_rows:,} groups, {size:,.1f} MiB in memory, {disk:,.1f} MiB on disk, one row group")


def measured(*command: object) -> dict[str, Any]:
    pin = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if shutil.which("taskset") else []
    wrapper = [sys.executable, "-I", "-S", "-c", MEASURE, *pin, sys.executable, *map(str, command)]
    found = json.loads(subprocess.run(wrapper, cwd=ROOT, capture_output=True, check=True, text=True).stdout)
    assert found.pop("code") == 0, found["error"]
    del found["error"]
    return dict(found)


def measured_select(source: Path, target: Path, rewards: Array, *options: str) -> dict[str, Any]:
    """Runs the command; its files must hold the pairs that selection on the array gives."""
    run = measured("-m", "rc_ray", "select", "--input", source, "--output", target, *options)
    found = select_indices(rewards, SelectionConfig())
    pairs = pq.read_table(target / "pairs", columns=["prompt_id", "chosen_index", "rejected_index"])
    groups = np.array([int(text, 16) for text in pairs["prompt_id"].to_pylist()])
    code = pairs["chosen_index"].to_numpy() * 8 + pairs["rejected_index"].to_numpy()
    same_pairs(source.name, (groups, code), (found.group, found.winner * 8 + found.loser))
    shutil.rmtree(target)
    return run


def part_4(results: Results, folder: Path) -> None:
    unit = 32 * MIB if results.quick else 1024 * MIB
    print(f"\n4. files (texts: {'AlpacaEval' if ALPACA.exists() else 'random words'})")
    pool, rewards = text_pool(), gaussian(400_000, 8, 3, seed=2)
    per_group = scored(pool, rewards[: 8 * len(pool)]).nbytes / (8 * len(pool) * 1.01)  # rather too many groups than too few
    used = {name: rewards[: int(size / per_group)] for name, size in (("big", unit), ("quarter", unit // 4), ("tiny", 1 << 18))}
    for name, part in used.items():
        write(folder / f"{name}.parquet", scored(pool, part))
    columns = ["prompt_id", "prompt", "candidates", *REWARDS]
    runs: dict[str, dict[str, list[Any]]] = {name: {"select": [], "pyarrow": [], "pyarrow, 2 answers": []} for name in used}
    for name in ["tiny", *["quarter", "big", "tiny"] * (2 if results.quick else 3)]:  # the first ones warm up
        source, target = folder / f"{name}.parquet", folder / "out"
        runs[name]["select"].append(measured_select(source, target, used[name]))
        runs[name]["pyarrow"].append(measured("-c", COPY, source, target, "all", *columns))
        runs[name]["pyarrow, 2 answers"].append(measured("-c", COPY, source, target, "two", *columns))
        target.unlink()
    results.numbers["files"] = runs
    wall = {name: {what: [run["wall"] for run in of] for what, of in runs[name].items()} for name in runs}
    peak = {name: {what: max(run["peak"] for run in of) / MIB for what, of in runs[name].items()} for name in runs}
    for name, what in itertools.product(runs, wall["big"]):
        print(f"   {name:8} {what:20} {spread(wall[name][what]):>20} s   {peak[name][what]:5,.0f} MiB peak memory")
    for other in ("pyarrow", "pyarrow, 2 answers"):
        of, to = wall["big"]["select"], wall["big"][other]
        start, other_start = min(wall["tiny"]["select"]), min(wall["tiny"][other])
        own = ratios([w - start for w in of], [w - other_start for w in to])
        print(f"   wall time of select over {other}: {spread(ratios(of, to))}; less that of the tiny file {spread(own)}")
    ratio = statistics.median(ratios(wall["big"]["select"], wall["big"]["pyarrow"]))
    results.bar(ratio <= 2, f"at least half the speed of bare pyarrow: {ratio:.2f} times its wall time")
    big, quarter = peak["big"]["select"], peak["quarter"]["select"]
    results.bar(big <= 1024, f"peak resident memory <= 1 GiB at {unit / MIB:,.0f} MiB of input: {big:,.0f} MiB")
    results.bar(big <= 1.15 * quarter + 64, f"and does not grow with the file: {big:,.0f} MiB; at a quarter {quarter:,.0f} MiB")
    rewards = gaussian(20_000 if results.quick else 1_000_000, 8, 3, seed=3)
    write(folder / "many.parquet", scored(pool, rewards, longest=40))
    run = measured_select(folder / "many.parquet", folder / "out", rewards, "--report")
    results.numbers["report"] = run
    most = run["peak"] / MIB
    results.bar(most <= 2048, f"--report over {len(rewards):,} groups <= 2 GiB: {most:,.0f} MiB ({run['wall']:.0f} s)")


def main() -> int:
    options, output = options_of(__doc__)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    results = Results(options.quick)
    results.numbers["machine"] = machine("numpy", "numba", "duckdb", "polars")
    print(json.dumps(results.numbers["machine"]) + "; one thread each")
    for n, k, groups, bound in ((8, 3, 200_000, 8), (64, 4, 10_000, 30)):
        part_1(results, n, k, groups, bound)
        part_1(results, n, k, groups, None)
    part_2(results)
    part_3(results, output)
    with tempfile.TemporaryDirectory() as folder:
        part_4(results, Path(folder))
    return results.finish("bench_selection", output)


if __name__ == "__main__":
    sys.exit(main())
