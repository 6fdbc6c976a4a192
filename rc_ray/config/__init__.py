"""Typed configuration. Imports neither ray, torch nor vllm."""

from rc_ray.config.base import PoolConfig
from rc_ray.config.load import (
    differences,
    fingerprint,
    load_config,
    load_reward_training,
    load_selection,
    result_fields,
    to_yaml,
)
from rc_ray.config.reward_training import RewardTrainingConfig
from rc_ray.config.rewards import (
    ClassifierReward,
    CustomReward,
    HttpReward,
    ImplicitReward,
    JudgeReward,
    RewardConfig,
    RuleReward,
)
from rc_ray.config.schema import (
    BudgetConfig,
    ClusterConfig,
    Config,
    EvaluationConfig,
    GenerationConfig,
    PolicyConfig,
    PromptsConfig,
    RoundsConfig,
)
from rc_ray.config.selection import EnsembleConfig, SelectionConfig, TransformConfig
from rc_ray.config.training import TrainingConfig

__all__ = [
    "BudgetConfig",
    "ClassifierReward",
    "ClusterConfig",
    "Config",
    "CustomReward",
    "EnsembleConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "HttpReward",
    "ImplicitReward",
    "JudgeReward",
    "PolicyConfig",
    "PoolConfig",
    "PromptsConfig",
    "RewardConfig",
    "RewardTrainingConfig",
    "RoundsConfig",
    "RuleReward",
    "SelectionConfig",
    "TrainingConfig",
    "TransformConfig",
    "differences",
    "fingerprint",
    "load_config",
    "load_reward_training",
    "load_selection",
    "result_fields",
    "to_yaml",
]
