"""The one way functions are compiled here: Numba without fast-math, so that results are those of IEEE arithmetic in the order
written, on one thread, without holding Python's lock, and kept on disk for the next process (NUMBA_CACHE_DIR moves them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiles at the first call with each set of argument types."""
    return cast(F, njit(cache=True, nogil=True)(function))
