"""The notebook in jobs/ runs from top to bottom and shows a plot of rewards before and after."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from tests.conftest import ROOT


def test_quickstart(small_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "hello {i}"}}\n' for i in range(12)))
    config = {**small_config, "output": str(tmp_path / "run"), "prompts": {"path": str(prompts)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("RC_RAY_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("RC_RAY_SET", "training.max_steps=1")
    notebook = nbformat.read(ROOT / "jobs" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    images = [
        o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs if "image/png" in o.get("data", {})
    ]
    assert len(images) == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "RAY_ADDRESS" not in os.environ
