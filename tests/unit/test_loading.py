"""What is loaded is loaded without the garbage collector."""

from __future__ import annotations

import gc

import pytest

from rc_ray.models.loading import no_collections


def test_the_collector_sleeps_while_loading_and_wakes_up_after_an_error_too() -> None:
    with no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="no such model"), no_collections():
        raise ValueError("no such model")
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled(), "it slept before"
    finally:
        gc.enable()
