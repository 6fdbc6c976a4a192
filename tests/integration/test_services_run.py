"""A run with rewards from services: one that fails now and then costs its prompts with the reason, and its token shows nowhere."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from tests.unit.test_services import SECRET, Answer, Service

FINE: Answer = (200, b"", {})


def test_what_fails_is_dropped_with_the_reason_and_no_secret_is_kept(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    service = Service()
    # The second request, of the four prompts of a chunk, answers nonsense; all others are fine.
    service.script = [FINE, (200, b'{"scores": "none"}', {}), FINE]
    config = copy.deepcopy(tiny_config) | {"output": str(tmp_path / "run"), "training": {"enabled": False}, "evaluation": {}}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"hello number {i}?"}) + "\n" for i in range(16)))
    config["prompts"] = {"path": str(tmp_path / "prompts.jsonl")}
    http = {"kind": "http", "url": service.url, "token_env": "SCORES_TOKEN", "batch_size": 24, "num_connections": 1}
    config["rewards"] = {"service": http, "length": tiny_config["rewards"]["length"]}
    config["cluster"] = {"chunk_size": 4, "progress_interval_s": 1}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "rc_ray", "run", "my.yaml"]
    with tempfile.TemporaryDirectory(prefix="ray") as ray_files:  # Ray's sockets need a short path
        environment = {**os.environ, "SCORES_TOKEN": SECRET, "RAY_TMPDIR": ray_files}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
        ray_logs = {file: file.read_bytes() for file in Path(ray_files).rglob("*") if file.is_file()}
    service.stop()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert {headers["Authorization"] for headers in service.headers} == {f"Bearer {SECRET}"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["identity"]["drops"]["reward_missing"] == 4
    drops = [row for file in (tmp_path / "run" / "drops").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    details = [row["detail"] for row in drops if row["reason"] == "reward_missing"]
    assert len(details) == 4
    assert all("no JSON object with a list `scores`" in detail for detail in details)
    assert SECRET not in done.stdout + done.stderr
    written = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    tables = {file: str(pq.read_table(file).to_pylist()).encode() for file in written if file.suffix == ".parquet"}
    assert len(tables) > 8
    assert len(ray_logs) > 8
    assert [
        str(file) for file, content in [*written.items(), *tables.items(), *ray_logs.items()] if SECRET.encode() in content
    ] == []
