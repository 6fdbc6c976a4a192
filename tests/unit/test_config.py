"""The configuration: what is accepted, and how what is not is explained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rc_ray.config import SelectionConfig, differences, fingerprint, load_config, result_fields, to_yaml
from rc_ray.errors import ConfigError

GOOD: dict[str, Any] = {
    "model": "some/model",
    "output": "runs/x",
    "prompts": {"path": "prompts.jsonl"},
    "rewards": {
        "helpful": {"kind": "classifier", "model": "some/reward"},
        "length": {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 20}},
    },
}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "generation.num_candidate=8",
            ["generation.num_candidate", "8", "unknown key", "Did you mean generation.num_candidates?"],
        ),
        ("num_candidates=8", ["num_candidates", "Did you mean generation.num_candidates?"]),
        ("rewards.helpful.modle=x", ["rewards.helpful.modle", "unknown key"]),
        ("generation.num_candidates=1", ["generation.num_candidates = 1", "greater than or equal to 2", "a pair needs two"]),
        ("generation.max_candidates=8", ["max_candidates (8)", "must be above num_candidates (8)"]),
        ("generation.target_gap=1", ["target_gap has no effect without max_candidates"]),
        ("generation.num_candidates=eight", ["generation.num_candidates = 'eight'", "valid integer"]),
        ("generation.temperature=0", ["generation.temperature = 0", "greater than 0"]),
        ("generation.max_tokens=4096", ["max_tokens (4096)", "max_model_len (2048)", "lower the first"]),
        ("generation.engine={seed: 3}", ["engine.seed", "field of its own"]),
        ("generation.engine={trust_remote_code: true}", ["engine.trust_remote_code", "field of its own"]),
        ("generation.engine={data_parallel_size: 2}", ["engine.data_parallel_size", "set pool.size"]),
        ("generation.engine={tokenizer: other}", ["engine.tokenizer", "model's own tokenizer"]),
        ("rewards={helpful: {kind: classifier, model: m}}", ["1 objective", "at least 2", "add another objective"]),
        ("rewards.helpful.kind=oracle", ["rewards.helpful", "oracle", "classifier"]),
        ("rewards.length.function=length_near", ["rewards.length.function = 'length_near'", "module:name"]),
        ("rewards.the one={kind: rule, function: 'a:b'}", ["objective name 'the one'"]),
        ("rewards.before={kind: rule, function: 'a:b'}", ["objective name 'before'", "call it otherwise", "before_quality"]),
        ("selection.margins={helpfull: 1}", ["selection.margins", "'helpfull'", "helpful, length"]),
        ("selection.scale={helpful: 1}", ["selection.scale lacks 'length'"]),
        ("selection={gap: sum, scale: {helpful: 1, length: 1}}", ["given scale has no effect", "gap sum"]),
        ("prompts.split=test", ["`split` applies to Hub datasets only"]),
        (
            "training.global_batch_size=6",
            ["global_batch_size (6)", "multiple of num_workers x per_device_batch_size", "set it to 4"],
        ),
        ("training.beta=.nan", ["training.beta", "finite"]),
    ],
)
def test_errors_name_field_value_reason_and_fix(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(GOOD, [override])
    for word in words:
        assert word in str(caught.value)


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(GOOD, ["seed=-1", "generation.top_p=2", "foo=1"])
    assert all(name in str(caught.value) for name in ("seed = -1", "generation.top_p = 2", "foo = 1"))


@pytest.mark.parametrize("override", ["seed", "=3", "seed=[1", "model.name=x"])
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(GOOD, [override])


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_resolved_yaml_gives_the_same_configuration(tmp_path: Path) -> None:
    config = load_config(GOOD, ["generation.temperature=0.7", "selection.margins.helpful=0.1"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_fingerprint_changes_with_results_and_not_with_deployment() -> None:
    base = fingerprint(load_config(GOOD))
    for same in (
        "output=elsewhere",
        "generation.pool.size=4",
        "rewards.helpful.pool.num_gpus=0.5",
        "cluster.chunk_size=3",
        "generation.engine={gpu_memory_utilization: 0.8, max_num_seqs: 64, tensor_parallel_size: 2}",
    ):
        assert fingerprint(load_config(GOOD, [same])) == base
    for other in (
        "seed=1",
        "generation.num_candidates=4",
        "generation.engine={gpu_memory_utilization: 0.8, quantization: fp8}",
        "rewards.length.args.target_words=9",
        "training.beta=0.2",
        "model=b/c",
    ):
        assert fingerprint(load_config(GOOD, [other])) != base


def test_differences_are_shown_by_key() -> None:
    old, new = (result_fields(load_config(GOOD, o)) for o in ([], ["generation.num_candidates=4"]))
    assert differences(old, new) == ["generation.num_candidates: 8 -> 4"]


def test_numbers_in_scientific_notation_are_numbers() -> None:
    # YAML 1.1 reads 1e-6, without a dot, as a string.
    assert load_config(GOOD, ["training.learning_rate=1e-6"]).training.learning_rate == 1e-6


def test_imports_stay_light() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import rc_ray; d = time.perf_counter() - t\n"
        "assert d < 1, d\n"
        "import rc_ray.config, rc_ray.core.selection, rc_ray.cli\n"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["selection.strategy=best_worst"], "no effect with selection.strategy best_worst"),
        (["selection.margins={helpful: 0.1}", "selection.margin_unit=scale"], "give selection.scale"),
        (["generation.target_gap=1"], "give selection.scale"),
    ],
)
def test_adaptive_sampling_needs_a_rule_that_is_known_while_it_samples(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(GOOD, ["generation.max_candidates=16", *overrides])
    load_config(GOOD, ["generation.max_candidates=16", "generation.target_gap=1", "selection.gap=sum"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["selection.scale={helpful: 1.0e-300, harmless: 1.0}"], "between 1e-100 and 1e\\+100"),
        (["selection.weights={helpful: 1.0e+300}"], "from 0 to 1e\\+100"),
        (["selection.strategy=best_random", f"selection.seed={1 << 63}"], "selection.seed"),
    ],
)
def test_numbers_with_which_no_score_could_be_computed_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(GOOD, overrides)


def test_map_cannot_weigh_ensembles_by_group() -> None:
    with pytest.raises(ValueError, match="use scale: data"):
        SelectionConfig(strategy="map", ensembles={"e": {"members": ["b", "c"]}}, scale="group", targets={"e": 0.5})
