"""The identity of a model folder: equal for equal weights, another for any that training touches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rc_ray.models import identity


def write(folder: Path, **changes: tuple[int, float]) -> str:
    """A model of a large and a small tensor, with a value of some changed; returns its identity."""
    folder.mkdir(exist_ok=True)
    tensors = {"large": np.arange(1 << 18, dtype=np.float32), "small": np.arange(100, dtype=np.float32)}
    for name, (place, value) in changes.items():
        tensors[name][place] = value
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text("{}")
    return identity.model_identity(str(folder))


@pytest.mark.parametrize("most", [identity.FULL_HASH_BYTES, 1000], ids=["whole", "pieces"])
def test_models_of_one_layout_differ_by_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(identity, "FULL_HASH_BYTES", most)
    own = write(tmp_path / "own")
    assert own.startswith("sha:" if most > 1000 else "pieces:")
    assert write(tmp_path / "copy") == own
    others = [
        write(tmp_path / "other", **{name: (place, -1.0)}) for name, place in (("small", 50), ("large", 0), ("large", -1))
    ]
    assert len({own, *others}) == 4


def test_large_models_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "FULL_HASH_BYTES", 1000)
    write(tmp_path / "own")
    with (tmp_path / "own" / "model.safetensors").open("rb") as stream:
        read = sum(len(block) for block in identity._pieces_of_tensors(stream))
    assert read < identity.PIECES * identity.PIECE_BYTES + 100 * 4 + 1000
