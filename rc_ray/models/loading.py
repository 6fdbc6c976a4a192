"""How a process loads what it computes with."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """The garbage collector sleeps meanwhile.

    The modules of torch, transformers, TRL and vLLM are a million objects that stay; looking at them again and again takes a third of the time
    of importing them.
    """
    awake = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if awake:
            gc.enable()
