"""Log-probs of the reference as columns: equal to TRL's own, computed once, and losses that do not notice them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.config import Config, load_config
from rc_ray.errors import DataError, ModelError
from rc_ray.ledger.storage import Folder
from rc_ray.pipeline.cluster import connected
from rc_ray.training import reference
from rc_ray.training.dpo import train_dpo
from rc_ray.training.reference import REFERENCE, look, pairs_task, reference_logps
from tests.conftest import make_llama

NUM_PAIRS = 22


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of different lengths in two files."""
    folder = tmp_path_factory.mktemp("reference") / "pairs"
    folder.mkdir()
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "chosen": [{"role": "assistant", "content": "hello " * (1 + i % 7)}],
            "rejected": [{"role": "assistant", "content": "you are " * (1 + i % 4)}],
        }
        for i in range(NUM_PAIRS)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:15]), folder / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[15:]), folder / "b.parquet")
    return folder


@pytest.fixture(scope="module")
def trl(tiny_policy: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL alone: its reference log-probs, and its losses with a reference model in the training process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    def trainer(precompute: bool) -> Any:
        return DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32),
            args=DPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4,
                learning_rate=1e-3, lr_scheduler_type="linear", num_train_epochs=1, logging_steps=1, save_strategy="no", seed=0,
                gradient_checkpointing=False, max_length=512, precompute_ref_log_probs=precompute, disable_tqdm=True,
            ),
            train_dataset=Dataset(pq.read_table(pairs)),
            processing_class=AutoTokenizer.from_pretrained(tiny_policy),
        )  # fmt: skip

    rows = trainer(True).train_dataset
    trained = trainer(False)
    trained.train()
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    return np.array([[row[name] for name in REFERENCE] for row in rows]), losses


def config_of(tiny_policy: Path, tmp_path: Path, **training: Any) -> Config:
    rule = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 3}}
    options = {"num_workers": 1, "global_batch_size": 4, "per_device_batch_size": 4, "learning_rate": 1e-3, **training}
    return load_config(
        {
            "model": str(tiny_policy),
            "output": str(tmp_path),
            "prompts": {"path": "p"},
            "rewards": {"a": rule, "b": rule},
            "training": options,
        }
    )


def computed(config: Config, pairs: Path, cache: Path, actors: int = 1) -> pa.Table:
    with connected(config.cluster):
        folder, names, _ = reference_logps(pairs_task(config, Folder.at(pairs), False, 1), Folder.at(cache), actors, 0.5, 0.0)
    return pa.concat_tables([folder.read_table(name) for name in names])


def test_log_probs_equal_those_of_trl_and_are_computed_once(tiny_policy: Path, pairs: Path, trl: Any, tmp_path: Path) -> None:
    config = config_of(tiny_policy, tmp_path)
    found = computed(config, pairs, tmp_path / "cache", actors=2)
    assert found.column("row").to_pylist() == list(range(NUM_PAIRS))
    values = np.array([found.column(name).to_pylist() for name in REFERENCE]).T
    assert np.abs(values - trl[0]).max() < 1e-4
    assert np.ptp(values) > 1
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.parquet")}
    assert computed(config, pairs, tmp_path / "cache").equals(found)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.parquet")} == times
    other = make_llama(tmp_path / "other", seed=9)
    assert not computed(config_of(other, tmp_path), pairs, tmp_path / "cache").equals(found), "another reference has its own"


def test_training_with_them_has_the_losses_of_trl_alone(tiny_policy: Path, pairs: Path, trl: Any, tmp_path: Path) -> None:
    from rc_ray.pipeline.progress import start_board

    config = config_of(tiny_policy, tmp_path)
    with connected(config.cluster):
        facts = train_dpo(
            config, Folder.at(pairs), Folder.at(tmp_path / "model"), Folder.at(tmp_path / "work"), 1.0, 0.0, start_board(),
            Folder.at(tmp_path / "cache"),
        )  # fmt: skip
    losses = [entry["loss"] for entry in facts["log_history"] if "loss" in entry]
    assert len(losses) == 6
    assert losses == pytest.approx(trl[1], abs=1e-4)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)
    assert losses[-1] < 0.6


def test_given_columns_are_taken_when_they_are_of_this_model_only(tiny_policy: Path, pairs: Path, tmp_path: Path) -> None:
    config = config_of(tiny_policy, tmp_path)
    own = computed(config, pairs, tmp_path / "cache")
    table = pq.read_table(pairs)
    right, wrong, half = (tmp_path / name for name in ("right", "wrong", "half"))
    for folder, factor in ((right, 1.0), (wrong, 1.005)):  # a policy after a few steps of training is as near
        folder.mkdir()
        columns = {name: pa.array(np.array(own.column(name).to_pylist()) * factor) for name in REFERENCE}
        pq.write_table(pa.table({**{name: table.column(name) for name in table.column_names}, **columns}), folder / "a.parquet")
    half.mkdir()
    pq.write_table(pq.read_table(right / "a.parquet").drop_columns(REFERENCE[1:]), half / "a.parquet")
    assert computed(config, right, tmp_path / "new").select(REFERENCE).equals(own.select(REFERENCE))
    with pytest.raises(DataError, match=r"ref_chosen_logps of pair 0 is .* gives .*another reference model or template"):
        computed(config, wrong, tmp_path / "new")
    with pytest.raises(DataError, match="of both answers and in all pairs, or in none"):
        computed(config, half, tmp_path / "new")


def test_a_reference_that_reads_other_tokens_is_refused(tiny_policy: Path, pairs: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = make_llama(tmp_path / "other", seed=9)
    text = (other / "tokenizer.json").read_text()
    swapped = json.loads(text)
    vocabulary = swapped["model"]["vocab"]
    first, second = AutoTokenizer.from_pretrained(other).tokenize("hello you")[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(swapped))
    config = config_of(tiny_policy, tmp_path, reference={"model": str(other)})
    with pytest.raises(
        ModelError, match=r"training\.reference\.model = .*has other tokens than the policy's for 2 that the pairs hold"
    ):
        computed(config, pairs, tmp_path / "cache")


def test_a_training_that_diverges_ends_and_says_at_which_step(tiny_policy: Path, pairs: Path, tmp_path: Path) -> None:
    from rc_ray.pipeline.progress import start_board

    config = config_of(tiny_policy, tmp_path, learning_rate=1e30, save_every_steps=1)
    with (
        connected(config.cluster),
        pytest.raises(
            ModelError, match=r"training diverged: (loss|grad_norm) of step (\d) is nan; lower .*begin anew"
        ) as ended,
    ):
        train_dpo(
            config, Folder.at(pairs), Folder.at(tmp_path / "model"), Folder.at(tmp_path / "work"), 1.0, 0.0, start_board(),
            Folder.at(tmp_path / "cache"),
        )  # fmt: skip
    assert not (tmp_path / "model").exists()
    step = int(re.findall(r"of step (\d)", str(ended.value))[0])
    assert {path.name for path in (tmp_path / "work").rglob("step-*")} == {f"step-{step - 1:06d}"}, "the last one before"


def test_a_look_from_the_command_line_finds_what_is_wrong_and_trains_nothing(
    tiny_policy: Path, pairs: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_policy, tmp_path / "run")
    (tmp_path / "my.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))

    def command(folder: Path) -> subprocess.CompletedProcess[str]:
        arguments = ["train", "my.yaml", "--preflight", "--input", str(folder)]
        return subprocess.run(
            [sys.executable, "-m", "rc_ray", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
        )

    good = command(pairs)
    assert good.returncode == 0, good.stderr
    assert f"{NUM_PAIRS} pairs, longest " in good.stdout
    assert "6 steps; nothing wrong" in good.stdout
    columns = {name: pa.array([-1.0] * 7 + [float("nan")] * 15) for name in REFERENCE}
    nan = tmp_path / "nan"
    nan.mkdir()
    table = pq.read_table(pairs)
    pq.write_table(pa.table({**{name: table.column(name) for name in table.column_names}, **columns}), nan / "a.parquet")
    assert "pair 7 has the reference log-probs (nan, nan); they must be finite" in command(nan).stderr
    bad = tmp_path / "bad"
    bad.mkdir()
    rows = pq.read_table(pairs / "a.parquet").to_pylist()
    rows[3]["chosen"] = rows[3]["rejected"]
    pq.write_table(pa.Table.from_pylist(rows), bad / "a.parquet")
    found = command(bad)
    assert found.returncode == 3
    assert "1 x equal_answers: pair 3 " in found.stderr
    assert not (tmp_path / "run").exists()


def test_a_look_by_actors_at_several_slices_finds_what_one_here_does(
    tiny_policy: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_policy, tmp_path)
    one = look(config, Folder.at(pairs), 1, 0.5)
    assert one.num_pairs == NUM_PAIRS
    monkeypatch.setattr(reference, "SLICE_ROWS", 9)
    with connected(config.cluster):
        several = look(config, Folder.at(pairs), 2, 0.5)
    assert several.digest != one.digest, "that is of the slices, of which there were several"
    assert replace(several, digest=one.digest) == one


def test_files_without_the_columns_are_named(tiny_policy: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), tmp_path / "p" / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet has no column rejected"):
        look(config_of(tiny_policy, tmp_path), Folder.at(tmp_path / "p"), 1, 0.5)
