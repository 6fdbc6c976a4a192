"""rc_ray: sample answers, score them under several objectives, keep the pairs on which all agree, train with DPO, on Ray.

    import rc_ray
    result = rc_ray.run("my.yaml")                      # all stages, in a run directory
    groups = rc_ray.sample(config, "prompts.parquet")   # one stage, Dataset or path in, Dataset out

Importing this package loads neither ray, torch nor vllm; each is loaded by the first call that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rc_ray.api import calibrate, evaluate, plan, preflight, report, run, sample, score, select, train, train_reward
    from rc_ray.config import Config, SelectionConfig, load_config
    from rc_ray.core.rule import consistency_matrix
    from rc_ray.core.selection import Selected, fit_selection, select_indices, select_pairs
    from rc_ray.core.selection_report import SelectionReport, selection_report
    from rc_ray.errors import ClusterError, ConfigError, DataError, ModelError, RcRayError, ResumeError

_HOMES = {
    "rc_ray.api": (
        "calibrate",
        "evaluate",
        "plan",
        "preflight",
        "report",
        "run",
        "sample",
        "score",
        "select",
        "train",
        "train_reward",
    ),
    "rc_ray.config": ("Config", "SelectionConfig", "load_config"),
    "rc_ray.core.rule": ("consistency_matrix",),
    "rc_ray.core.selection": ("Selected", "fit_selection", "select_indices", "select_pairs"),
    "rc_ray.core.selection_report": ("SelectionReport", "selection_report"),
    "rc_ray.errors": ("ClusterError", "ConfigError", "DataError", "ModelError", "RcRayError", "ResumeError"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ClusterError",
    "Config",
    "ConfigError",
    "DataError",
    "ModelError",
    "RcRayError",
    "ResumeError",
    "Selected",
    "SelectionConfig",
    "SelectionReport",
    "calibrate",
    "consistency_matrix",
    "evaluate",
    "fit_selection",
    "load_config",
    "plan",
    "preflight",
    "report",
    "run",
    "sample",
    "score",
    "select",
    "select_indices",
    "select_pairs",
    "selection_report",
    "train",
    "train_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rc_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
