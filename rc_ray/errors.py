"""The errors a user can act on, in one small tree.

Every message names the field (or file), its value, the reason and the next step. The command line prints them without a
stack trace and exits with `exit_code`; anything else that escapes is a bug of ours and keeps its trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# Between two errors in Python's traceback.
DIRECT_CAUSE = "\n\nThe above exception was the direct cause of the following exception:\n\n"


class RcRayError(Exception):
    """Base of all errors that the user can act on."""

    exit_code = 1


class ConfigError(RcRayError):
    """The configuration is wrong: unknown key, wrong type, impossible combination."""

    exit_code = 2


class DataError(RcRayError):
    """An input file or table is missing, unreadable or not of the stated shape."""

    exit_code = 3


class ModelError(RcRayError):
    """A model folder or Hub id cannot be found, read or used."""

    exit_code = 4


class ClusterError(RcRayError):
    """The Ray cluster cannot be reached or cannot hold the pools."""

    exit_code = 5


class ResumeError(RcRayError):
    """A run directory belongs to another configuration, or its records do not add up."""

    exit_code = 6


@contextlib.contextmanager
def computing(what: str, advice: str = "") -> Iterator[None]:
    """Around what Ray computes.

    Raises:
        ClusterError: Ray raised something; its first cause is named.
    """
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, ExecutionTimeoutError) as error:
        raise ClusterError(f"{what} failed: {innermost(error)}{advice}") from error


def innermost(error: BaseException) -> str:
    """The first cause of an error that Ray wrapped, in one line.

    Causes that Ray Data wrapped in a worker do not travel with the error; they are in its text alone, the first one first.
    """
    first, mark, _ = str(error).partition(DIRECT_CAUSE)
    if mark:
        return first.strip().splitlines()[-1][:600]
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None and inner is not cause:
        if type(inner).__name__ == "SystemException":  # Ray Data's mark for what is not the user's code, without a word
            break
        cause = inner
    text = str(cause).strip() or type(cause).__name__
    if 'File "' in text:  # a traceback, whatever its first line
        text = text.splitlines()[-1]
    return f"{type(cause).__name__}: {text}"[:600]
