"""What is said of an error that Ray raised."""

from __future__ import annotations

import errno
import pickle

import pytest
from ray.exceptions import RayTaskError, UserCodeException

from rc_ray.errors import ClusterError, innermost
from rc_ray.pipeline.graph import resumable

FULL = "[Errno 28] No space left on device: '/run/candidates/chunk-000007.parquet'"


def task_error(traceback: str, cause: Exception) -> RayTaskError:
    """As the driver gets it."""
    return RayTaskError("f", traceback, pickle.loads(pickle.dumps(cause)), "ray::f", 1, "127.0.0.1").as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        task_error(
            f'ray::f() (pid=1)\n  File "ledger.py", line 43, in commit\n    folder.write_table(name, table)\nOSError: {FULL}\n\n'
            "The above exception was the direct cause of the following exception:\n\n"
            "ray::f() (pid=1)\nray.exceptions.UserCodeException: UDF failed to process a data block.\nFailed after 1/1 attempts.",
            UserCodeException("UDF failed to process a data block.\nFailed after 1/1 attempts."),
        ),
        task_error(f"ray::f() (pid=1)\nOSError: {FULL}", OSError(errno.ENOSPC, "No space left on device", FULL.split("'")[1])),
    ],
    ids=["wrapped by Ray Data", "plain"],
)
def test_the_first_cause_is_told_and_what_to_do(error: RayTaskError) -> None:
    assert innermost(error) == f"OSError: {FULL}"
    with pytest.raises(ClusterError) as told, resumable("sample"):
        raise error
    assert str(told.value).startswith(f"stage sample failed: OSError: {FULL}\n")
    assert "run the same command again to resume" in str(told.value)
