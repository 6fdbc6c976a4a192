"""The notebook in jobs/ runs from top to bottom on the demo at the smallest size: the embedded SmolLM2, reward models trained from the
embedded pairs, two workers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

SIZES = [
    "prompts.limit=6",
    "generation.max_tokens=48",
    "selection.allow_truncated_winner=true",
    "evaluation.prompts.limit=3",
    "evaluation.num_samples=1",
    "training.max_steps=1",
    "training.global_batch_size=4",
]


def test_the_quickstart_on_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RC_RAY_CONFIG", raising=False)
    monkeypatch.setenv("RC_RAY_SET", " ".join([*SIZES, f"output={tmp_path}/run"]))
    notebook = nbformat.read(ROOT / "jobs" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1, "rewards before and after"
    assert "6 prompts = " in "".join(output.get("text", "") for output in outputs)
    pairs, drops = (pq.read_table(tmp_path / "run" / name) for name in ("pairs", "drops"))
    assert pairs.num_rows + drops.num_rows == 6
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 1
    assert set(metrics["evaluation"]["objectives"]) == {"helpful", "harmless", "concise"}
    assert metrics["sampling"]["candidates"] == 24
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "RAY_ADDRESS" not in os.environ
