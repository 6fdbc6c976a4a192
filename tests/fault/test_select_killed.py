"""SIGKILL of `rc-ray select` at many moments: the repeated command ends with the same bytes as an undisturbed one."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray.core import schemas

NUM_GROUPS, NUM_CANDIDATES, NUM_KILLS = 100_000, 8, 8


def write_scored(path: Path) -> None:
    """100,000 scored groups of eight answers of about 300 characters."""
    rng = np.random.default_rng(0)
    words = pa.array(["".join(rng.choice(list("abcdefgh "), rng.integers(200, 400))) for _ in range(2000)])
    names = ["helpful", "harmless"]
    schema = pa.schema([*schemas.GROUP, *schemas.reward_fields(names)])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, NUM_GROUPS, 5000):
            count = 5000 * NUM_CANDIDATES
            offsets = pa.array(np.arange(5001, dtype=np.int32) * NUM_CANDIDATES)
            columns = {
                "text": words.take(pa.array(rng.integers(0, len(words), count))),
                "token_ids": pa.nulls(count, pa.list_(pa.int32())),
                "finish_reason": pa.array(np.where(rng.random(count) < 0.1, "length", "stop")),
                "seed": pa.array(np.arange(count)),
                "logprob": pa.array(rng.normal(size=count)),
                "policy": pa.array(["policy"]).take(pa.array(np.zeros(count, dtype=np.int64))),
            }
            candidates = pa.ListArray.from_arrays(
                offsets, pa.StructArray.from_arrays(list(columns.values()), fields=list(schemas.CANDIDATE))
            )
            rewards = [pa.ListArray.from_arrays(offsets, pa.array(rng.normal(size=count).astype(np.float32))) for _ in names]
            nothing = pa.nulls(5000, pa.string())
            prompts = pa.array([[{"role": "user", "content": f"prompt {start + i}"}] for i in range(5000)], schemas.MESSAGES)
            ids = pa.array([f"{start + i:032x}" for i in range(5000)])
            arrays = [ids, prompts, candidates, nothing, nothing, rewards[0], nothing, rewards[1], nothing]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def command(source: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "rc_ray", "select", "--input", str(source), "--output", str(output), "--report"]


def content(folder: Path) -> dict[str, str]:
    """Hash of every file, hidden ones too, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_selection_killed_at_any_moment_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "scored.parquet"
    write_scored(source)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(source, whole), check=True, capture_output=True, timeout=300)

    moments = random.Random(0)
    num_chunks = len(list((whole / "pairs").iterdir()))
    interrupted_with = []
    for number in range(NUM_KILLS):
        victim = subprocess.Popen(command(source, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # First while the data are measured and before anything is written, then a little after each further commit.
        aim = min(number, num_chunks - 1)
        deadline = time.monotonic() + 120
        while len(list(killed.glob("ledger/select/*.json"))) < aim and victim.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.15) if number else 1.0)
        victim.send_signal(signal.SIGKILL)
        if victim.wait() == -signal.SIGKILL:
            interrupted_with.append(len(list(killed.glob("ledger/select/*.json"))))
    assert len({n for n in interrupted_with if 0 < n < num_chunks}) >= 3, (
        f"kills fell at {interrupted_with} of {num_chunks} chunks"
    )

    before = {path: path.stat().st_mtime_ns for path in killed.glob("ledger/select/*.json")}
    subprocess.run(command(source, killed), check=True, capture_output=True, timeout=300)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()), "a committed chunk was selected again"
    assert content(killed) == content(whole)
    assert pq.read_table(whole / "pairs").num_rows + pq.read_table(whole / "drops").num_rows == NUM_GROUPS
