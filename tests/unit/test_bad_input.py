"""Input that is damaged, odd or foreign: each case is named to the user, and costs nothing beyond its own row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.cli import main
from rc_ray.config import ClassifierReward, EvaluationConfig, PromptsConfig, load_config, load_reward_training
from rc_ray.core import schemas
from rc_ray.errors import ConfigError, DataError, RcRayError, ResumeError
from rc_ray.evaluation.compare import compare
from rc_ray.generation.arguments import check_engine_arguments, engine_arguments
from rc_ray.ledger import rundir
from rc_ray.ledger.storage import Folder
from rc_ray.models.resolve import max_context
from rc_ray.pipeline.plan import make_plan
from rc_ray.pipeline.prompts import check_source, read_cells, write_chunks
from rc_ray.rewards.rule import RuleRewardFunction, load_function
from rc_ray.training.preferences import read_preferences
from rc_ray.training.reward_model import prepare


def chunked(path: Path, out: Path) -> Any:
    config = PromptsConfig(path=str(path))
    check_source("prompts", config)
    facts = write_chunks(read_cells("prompts", config), config, Folder.at(out / "c"), Folder.at(out / "d"), 8)
    return facts, Folder.at(out / "d").read_all(schemas.DROP).to_pylist()


def base(output: Path) -> dict[str, Any]:
    rule = {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 3}}
    return {"model": "m/m", "output": str(output), "prompts": {"path": "p.jsonl"}, "rewards": {"a": rule, "b": rule}}


# --- pipeline/prompts.py


def test_id_of_a_row_without_the_column_is_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"other": 1}\n')
    ids = set()
    for i in range(5):
        keep = [object() for _ in range(i * 1000)]  # moves the address of the marker
        ids.add(chunked(tmp_path / "p.jsonl", tmp_path / str(i))[1][0]["prompt_id"])
        del keep
    assert len(ids) == 1


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": ' + "1" * 5000 + "}",
        "[" * 100_000,
        '{"prompt": [{"role": "\\ud83d", "content": "x"}, {"role": "user", "content": "y"}]}',
    ],
    ids=["number of 5000 digits", "deep nesting", "lone surrogate in a role"],
)
def test_a_bad_row_never_stops_a_run(line: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n' + line + '\n{"prompt": "y"}\n')
    facts, _ = chunked(tmp_path / "p.jsonl", tmp_path / "o")
    assert (facts["prompts"], facts["drops"]) == (2, {"invalid_prompt": 1})


def test_a_parquet_string_that_is_no_utf8_is_one_bad_row(tmp_path: Path) -> None:
    odd = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"prompt": odd}), tmp_path / "p.parquet")
    facts, _ = chunked(tmp_path / "p.parquet", tmp_path / "o")
    assert (facts["prompts"], facts["drops"]) == (1, {"invalid_prompt": 1})


@pytest.mark.parametrize(
    "content", [b'{"prompt": "x"}\n', gzip.compress(b'{"prompt": "x"}\n' * 999)[:-20]], ids=["plain", "cut"]
)
def test_a_broken_gzip_file_is_a_data_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError):
        chunked(tmp_path / "p.jsonl.gz", tmp_path / "o")


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.csv", "\ufeffid,x\n1,a\n"), ("p.csv", "\ufeffprompt\nx\n"), ("p.jsonl", '\ufeff{"prompt": "x"}\n')],
)
def test_a_byte_order_mark_is_no_part_of_the_column(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    column = "id" if "id" in content else "prompt"
    assert check_source("prompts", PromptsConfig(path=str(tmp_path / name), column=column))


def test_a_file_name_with_brackets_is_found(tmp_path: Path) -> None:
    (tmp_path / "data[1].jsonl").write_text('{"prompt": "x"}\n')
    assert chunked(tmp_path / "data[1].jsonl", tmp_path / "o")[0]["prompts"] == 1


# --- pipeline/plan.py


@pytest.mark.parametrize("tickets", [0.9, 1.0, 1.5])
def test_tickets_of_the_user_that_leave_room_fit(tickets: float, tmp_path: Path) -> None:
    rewards = {n: {"kind": "classifier", "model": "m"} for n in "ab"}
    config = load_config({**base(tmp_path), "rewards": rewards, "generation": {"pool": {"num_cpus": tickets}}})
    plan = make_plan(config, cpus=2, gpus=0)
    assert plan.generation.num_cpus == tickets


# --- generation/arguments.py


def test_an_engine_argument_that_vllm_does_not_have_is_named_without_importing_vllm() -> None:
    check_engine_arguments({"max_num_seqs": 4, "tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"generation\.engine\.max_num_seq = 4: .* did you mean 'max_num_seqs'\?"):
        check_engine_arguments({"max_num_seq": 4})
    with pytest.raises(ConfigError, match=r"generation\.engine\.hf_token.*HF_TOKEN on every node") as refused:
        check_engine_arguments({"hf_token": "hf_secret"})
    assert "hf_secret" not in str(refused.value)


def test_the_engine_arguments_are_those_that_vllm_takes() -> None:
    from vllm import EngineArgs

    assert engine_arguments() == set(EngineArgs.__dataclass_fields__)


# --- ledger


def test_names_go_before_the_query_of_a_uri() -> None:
    folder = Folder.at("s3://bucket/run?region=us-east-1") / "ledger"
    assert folder.filesystem()[1] == "bucket/run/ledger"


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RcRayError):
        rundir.check_owner(load_config(base(tmp_path / "file")), {})


@pytest.mark.parametrize("content", ["{}", "{", "[]"])
def test_a_foreign_manifest_is_a_resume_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ResumeError):
        rundir.check_owner(load_config(base(tmp_path)), {})


def test_a_kill_while_the_directory_is_made_does_not_lock_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(base(tmp_path / "run"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        rundir.create(config, {})
    monkeypatch.undo()
    rundir.create(config, {})


# --- rewards


def odd(prompts: Any, answers: Any, value: Any) -> Any:
    return [1.0, eval(value)]


@pytest.mark.parametrize("value", ["'0.5'", "10**400", "[1]"])
def test_a_value_that_is_no_number_is_missing(value: str) -> None:
    first, second = RuleRewardFunction(f"{__name__}:odd", {"value": value}).score([[], []], ["a", "b"])
    assert first.value == 1.0
    assert second.value is None


def test_a_value_beyond_float32_is_missing() -> None:
    (_, second) = RuleRewardFunction(f"{__name__}:odd", {"value": "1e39"}).score([[], []], ["a", "b"])
    assert second.value is None


@pytest.mark.parametrize(("code", "name"), [("def f(:", "f"), ("from os import nope", "f"), ("1/0", "f"), ("f = max", "f")])
def test_a_rule_module_that_cannot_be_loaded_is_a_configuration_error(
    code: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"broken_{abs(hash(code))}"
    (tmp_path / f"{module}.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError):
        load_function(f"{module}:{name}", {})


def test_a_limit_beyond_the_models_positions_does_not_break_scoring(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from rc_ray.rewards.classifier import ClassifierRewardModel
    from tests.conftest import make_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(
        BertConfig(vocab_size=400, max_position_embeddings=32, num_labels=1, **sizes)
    ).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = ClassifierRewardModel(ClassifierReward(kind="classifier", model=str(tmp_path), max_length=64), False, 1)
    short, long = model.score([[{"role": "user", "content": "q"}]] * 2, ["x", "xyz" * 15])
    assert short.value is not None
    assert long.value is None


# --- models


def test_a_broken_config_json_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RcRayError):
        max_context(str(tmp_path))


# --- training


def test_line_separators_inside_json_strings_are_kept(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "one\u2028two\x85", "rejected": "b"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_preferences(str(tmp_path / "p.jsonl"))[0][0].chosen == "one\u2028two\x85"


@pytest.mark.parametrize(
    "line",
    [
        "1",
        '{"prompt": "q", "chosen": null, "rejected": "b"}',
        '{"prompt": "q", "chosen": [], "rejected": "b"}',
        '{"text": ["a"], "score": [1]}',
    ],
)
def test_an_odd_preference_row_is_a_data_error(line: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(DataError):
        read_preferences(str(tmp_path / "p.jsonl"))


def test_preferences_that_are_no_parquet_are_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_text("x")
    with pytest.raises(DataError):
        read_preferences(str(tmp_path / "p.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_test": 0}, r"num_test = 0: input should be greater than or equal to 1.*Held-out pairs"),
        ({"num_epochs": 0}, "num_epochs = 0: input should be greater than 0"),
        ({"label_smoothing": 0.5}, "label_smoothing = 0.5: input should be less than 0.5"),
        ({"epochs": 3}, "epochs = 3: unknown key"),
        ({"method": "most"}, "method = 'most'"),
        ({"momentum": 0.5}, "momentum has no effect without method more"),
        ({"method": "multitask", "normalize": "l2"}, "normalize has no effect without method more"),
        ({"lora_alpha": 8}, "lora_alpha has no effect without lora_rank"),
        ({"method": "more", "heads": "per_objective"}, "can never conflict"),
        ({"batch_size": 10, "num_workers": 4}, r"not a multiple of num_workers x per_device_batch_size \(4 x 1\); set it to 8"),
    ],
)
def test_options_of_reward_training_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward_training(options)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a"], {"method": "more"}, "method = more: has no effect with one preference set"),
        (["a"], {"heads": "per_objective"}, "heads = per_objective: has no effect with one preference set"),
        (["a", "b"], {"method": "single"}, "method = single: trains on one preference set, and 2 are given"),
        (["a b"], {}, "'a b' is no name"),
    ],
)
def test_a_method_that_does_not_fit_the_number_of_sets_is_refused(
    names: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(dict.fromkeys(names, "embedded:helpful"), "unused", load_reward_training(options))


# --- evaluation


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_prompt_with_a_reward_that_is_not_finite_is_left_out(bad: float) -> None:
    schema = pa.schema([*schemas.GROUP, *schemas.reward_fields(["a"])])
    candidate = {"text": "x", "token_ids": [1], "finish_reason": "stop", "seed": 0, "logprob": 0.0}

    def table(values: list[float]) -> pa.Table:
        rows = [{"prompt_id": f"p{i}", "prompt": [], "candidates": [candidate], "reward.a": [v]} for i, v in enumerate(values)]
        return pa.Table.from_pylist(rows, schema=schema)

    result = compare(table([1.0, bad, 2.0]), table([2.0, 1.0, 2.0]), ["a"], EvaluationConfig(num_bootstrap=100), 0)
    assert np.isfinite(result.objectives["a"].before.mean)
    assert (result.num_prompts, result.num_left_out) == (2, 1)


# --- cli.py


def test_an_evaluation_file_that_exists_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.json").write_text("{}")
    (tmp_path / "c.yaml").write_text(json.dumps(base(tmp_path / "run")))
    assert main(["evaluate", str(tmp_path / "c.yaml"), "--input", "m", "--output", str(tmp_path / "e.json")]) == 3
    assert "e.json" in capsys.readouterr().err


def test_a_rule_that_is_not_there_is_named_by_its_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    config = base(tmp_path / "run")
    config["prompts"]["path"] = str(tmp_path / "p.jsonl")
    config["rewards"]["b"] = {"kind": "rule", "function": "rc_ray.rewards.rules:nope"}
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    config["model"] = str(tmp_path)
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path / "c.yaml")]) == 2
    assert "rewards.b.function" in capsys.readouterr().err
