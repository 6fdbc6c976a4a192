"""What training workers share of a node; that they train is in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from rc_ray.ledger.storage import Folder
from rc_ray.training import workers
from rc_ray.training.workers import Place, rows_of_node


def test_the_rows_of_all_files_are_read_once_per_node_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, names = Folder.at(tmp_path / "tokens"), [f"{(7 * i) % 19:02}.parquet" for i in range(19)]
    for i, name in enumerate(names):
        folder.write_table(name, pa.table({"row": [2 * i, 2 * i + 1], "ids": [[i], []]}))
    reads: list[str] = []
    read_table = Folder.read_table
    monkeypatch.setattr(Folder, "read_table", lambda self, name: reads.append(name) or read_table(self, name))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    assert len(names) > workers.NUM_READERS
    places = [Place(rank, rank, 2, tmp_path / "node", None) for rank in (0, 1)]
    rows = [rows_of_node(folder, names, place) for place in places]
    assert sorted(reads) == sorted(names)
    for of_worker in rows:
        assert of_worker["row"][:] == list(range(38))
        assert of_worker[37] == {"row": 37, "ids": []}
        assert of_worker[36]["ids"] == [18]
        assert of_worker.cache_files == [{"filename": str(tmp_path / "node" / "rows.arrow")}]
