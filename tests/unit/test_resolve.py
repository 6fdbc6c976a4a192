"""Models on storage that all nodes reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from rc_ray.models.resolve import local_model


def test_a_model_that_took_the_place_of_another_is_fetched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RC_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "storage" / "deep").mkdir(parents=True)
    (tmp_path / "storage" / "deep" / "weights").write_text("first")
    uri = f"file://{tmp_path}/storage"
    first = local_model(uri)
    assert local_model(uri) == first
    (tmp_path / "storage" / "deep" / "weights").write_text("other")  # of the same size
    second = local_model(uri)
    assert [(Path(found) / "deep" / "weights").read_text() for found in (first, second)] == ["first", "other"]
