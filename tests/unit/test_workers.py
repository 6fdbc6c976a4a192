"""What training workers share of a node; that they train is in tests/integration."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from rc_ray.ledger.storage import Folder
from rc_ray.training import workers
from rc_ray.training.workers import SNAPSHOT, Place, mend_record, rows_of_node


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


def test_a_record_of_checkpoints_that_was_broken_off_is_written_anew_from_the_last_one(tmp_path: Path) -> None:
    folder, record = Folder.at(tmp_path), tmp_path / SNAPSHOT
    for step in ("step-000050", "step-000100"):
        folder_of_step = folder / step
        folder_of_step.write_json("trainer_state.json", {})
    mend_record(folder)
    assert not record.exists(), "without a record no checkpoint counts"
    record.write_text('{"whole": true}')
    mend_record(folder)
    assert record.read_text() == '{"whole": true}'
    for torn in ("", '{"checkpoint_results": [{"chec', "\x00\x00"):
        record.write_text(torn)
        mend_record(folder)
        state = json.loads(record.read_text())
        assert [each["checkpoint_dir_name"] for each in state["checkpoint_results"]] == ["step-000100"]
        assert state["latest_checkpoint_result"] == state["checkpoint_results"][0]
