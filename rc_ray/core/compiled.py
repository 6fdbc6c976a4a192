"""The one way functions are compiled here: Numba without fast-math, so that results are those of IEEE arithmetic in the order
written, on one thread, without holding Python's lock, and kept on disk for the next process (NUMBA_CACHE_DIR moves them).

What is kept is used again only while all of this package's sources are what they were: Numba itself looks at the file of the
function alone, and would run an old version of what that calls from other files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])
SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def compiled(function: F) -> F:
    """Compiles at the first call with each set of argument types."""
    dispatcher: Any = njit(cache=True, nogil=True)(function)
    kept = dispatcher._cache
    index_key = kept._index_key
    kept._index_key = lambda signature, codegen: (*index_key(signature, codegen), SOURCES)
    return cast(F, dispatcher)
