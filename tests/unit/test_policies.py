"""Several policies: what is accepted, who shares an engine, and how engines fill a group one after the other."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from rc_ray.config import Config, SelectionConfig, fingerprint, load_config, to_yaml
from rc_ray.core import schemas
from rc_ray.core.ids import candidate_seed
from rc_ray.core.selection import fit_selection, select_pairs
from rc_ray.errors import ClusterError, ConfigError, ModelError, ResumeError
from rc_ray.generation.arguments import lora_arguments
from rc_ray.generation.engine import Candidate
from rc_ray.generation.load import Load
from rc_ray.ledger import rundir
from rc_ray.models.resolve import check_adapter
from rc_ray.pipeline import policies, stages
from rc_ray.pipeline.actors import SAMPLED, GenerateGroups, count_policies
from rc_ray.pipeline.plan import make_plan
from rc_ray.pipeline.policies import engines_of, members_of, policy_of

BASE: dict[str, Any] = {
    "model": "org/student",
    "output": "runs/x",
    "prompts": {"path": "prompts.jsonl"},
    "rewards": {
        "helpful": {"kind": "classifier", "model": "org/helpful"},
        "length": {"kind": "rule", "function": "rc_ray.rewards.rules:length_near", "args": {"target_words": 20}},
    },
}
MIXED = "generation.policies={plain: {weight: 3}, big: {model: org/teacher, weight: 4}, tuned: {adapter: org/lora}}"


def config(*overrides: str) -> Config:
    return load_config(BASE, overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["generation.policies={a: {weight: 0}, b: {}}"], ["generation.policies.a.weight = 0", "greater than 0"]),
        (["generation.policies={a: {adaptor: x}}"], ["generation.policies.a.adaptor", "unknown key"]),
        (["generation.policies={a b: {}}"], ["policy name 'a b'"]),
        (["generation.policies={a: {weight: 2}}"], ["a weight has no effect with one policy"]),
        (["generation.policies={a: {}, b: {model: org/student}}"], ["'a' and 'b' are the same policy"]),
        (["generation.policies={a: {revision: v1}}"], ["`revision` has no effect without a `model` here"]),
        (["generation.policies={a: {trust_remote_code: true}}"], ["`trust_remote_code` has no effect without a `model`"]),
        ([MIXED, "generation.adapter=org/lora"], ["adapter has no effect beside policies"]),
        ([MIXED, "generation.max_candidates=16"], ["max_candidates with several policies", "use one policy"]),
        (["generation.engine={enable_lora: true}"], ["engine.enable_lora is set where there is an adapter"]),
        (["generation.engine={max_loras: 2}"], ["engine.max_loras has no effect without an adapter"]),
        (
            ["generation.adapter=org/lora"],
            ["generation.adapter = 'org/lora'", "DPO starts from `model`", "training.enabled: false"],
        ),
    ],
)
def test_errors_say_what_is_wrong(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [MIXED],
        [MIXED, "generation.engine={max_lora_rank: 64}"],
        ["generation.policies={only: {model: org/teacher}}", "generation.max_candidates=16"],
        ["generation.adapter=org/lora", "training.enabled=false", "generation.max_candidates=16"],
    ],
)
def test_what_is_accepted_stays_so_when_written_out(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config(*overrides)))
    assert load_config(tmp_path / "config.yaml") == config(*overrides)


def test_policies_change_results() -> None:
    prints = {
        fingerprint(config(*overrides))
        for overrides in (
            [],
            [MIXED],
            [MIXED, "generation.policies.plain.weight=2"],
            [MIXED, "generation.policies.big.revision=v1"],
            ["training.enabled=false"],
            ["training.enabled=false", "generation.adapter=org/lora"],
        )
    }
    assert len(prints) == 6


def test_policies_of_one_model_share_an_engine_whatever_their_order() -> None:
    members = members_of(config(MIXED))
    assert [m.name for m in members] == ["big", "plain", "tuned"]
    assert [[m.name for m in engine] for engine in engines_of(members)] == [["big"], ["plain", "tuned"]]
    turned = "generation.policies={tuned: {adapter: org/lora}, plain: {weight: 3}, big: {model: org/teacher, weight: 4}}"
    assert fingerprint(config(turned)) == fingerprint(config(MIXED))
    assert members_of(config(turned)) == members
    three = ["z: {model: org/teacher}", "b: {}", "a: {model: org/teacher, adapter: org/lora}"]
    for order in (three, three[::-1]):
        assert [m.name for m in members_of(config(f"generation.policies={{{', '.join(order)}}}"))] == ["a", "z", "b"]
    # Members of one engine stay together, so that engines only ever append.
    split = members_of(config("generation.policies={a: {}, b: {model: org/teacher}, c: {adapter: org/lora}}"))
    assert [m.name for m in split] == ["a", "c", "b"]


def test_without_policies_the_only_one_is_the_model() -> None:
    (member,) = members_of(config("generation.adapter=org/lora", "training.enabled=false", "revision=v2"))
    assert (member.name, *member.base, member.adapter) == ("policy", "org/student", "v2", False, "org/lora")
    # What is trained and evaluated is the model itself.
    assert [m.base for m in policy_of(config(MIXED), None, 2).members] == [("org/student", None, False)]
    assert [m.model for m in policy_of(config(MIXED), "runs/x/model", 2).members] == ["runs/x/model"]


def test_every_model_has_a_pool_and_all_of_them_count() -> None:
    plan = make_plan(config(MIXED, "generation.pool.size=2"), cpus=32, gpus=5)
    assert list(plan.engines) == ["generation big", "generation plain+tuned"]
    assert (plan.num_engines, plan.mode, plan.engines_per_host) == (4, "streaming", 4)
    assert all("a model of its own" in pool.reason for pool in plan.engines.values())
    assert sum(line.startswith("generation ") for line in plan.lines()) == 2
    fewer = make_plan(config(MIXED, "generation.pool.size=2"), cpus=32, gpus=4)
    assert fewer.phases == [["generation big", "generation plain+tuned"], ["helpful", "length"]]
    with pytest.raises(
        ClusterError, match=r"generation big \+ generation plain\+tuned need 4 GPUs at once and the cluster has 3"
    ):
        make_plan(config(MIXED, "generation.pool.size=2"), cpus=32, gpus=3)


def test_the_plan_names_policies_with_their_shares() -> None:
    assert policies.lines(config(MIXED)) == [
        "big  50.0% of the candidates, weight 4: org/teacher",
        "plain  37.5% of the candidates, weight 3: org/student",
        "tuned  12.5% of the candidates, weight 1: org/student + adapter org/lora",
    ]


def test_the_manifest_tells_revisions_of_one_model_apart() -> None:
    named = (
        "generation.policies={a: {}, b: {model: org/student}, c: {model: org/teacher}, d: {model: org/teacher, revision: v3}}"
    )
    assert policies.model_names(config("revision=v2", named, "generation.policies.a.adapter=org/lora")) == {
        "org/student@v2": ("org/student", "v2", False),
        "org/lora": ("org/lora", None, True),
        "org/student": ("org/student", None, False),
        "org/teacher": ("org/teacher", None, False),
        "org/teacher@v3": ("org/teacher", "v3", False),
        "org/helpful": ("org/helpful", None, False),
    }


class Engine(GenerateGroups):
    """One engine of several, with recorded answers in the place of vLLM."""

    def __init__(self, of: Config, engine: int, refuses: str = "") -> None:
        self._open(policy_of(of), engine, None, "sample", 3)
        self._renderers = {name: lambda messages: list(range(len(messages[0]["content"]))) for name in self._own}  # type: ignore[misc]
        self._engine = self
        self.refuses, self.asked, self.counted = refuses, 0, 0

    def take_load(self) -> Load:
        return Load()

    def submit(self, ids: list[int], seed: int, number: int, adapter: str | None) -> Future[list[Candidate]]:
        future: Future[list[Candidate]] = Future()
        self.asked += 1
        if self.refuses and len(ids) == len(self.refuses):
            future.set_exception(ValueError("no"))
        else:
            future.set_result([Candidate(f"{adapter} {seed + i}", [1, 2], "stop", seed + i, -1.0) for i in range(number)])
        return future

    def _count(self, row: dict[str, Any]) -> None:
        self.counted += 1


def groups(*prompts: str, sampled: bool = False) -> pa.Table:
    rows = [
        {
            "prompt_id": p,
            "prompt": [{"role": "user", "content": p}],
            "candidates": None,
            "failure": None,
            "failure_detail": None,
        }
        for p in prompts
    ]
    return pa.Table.from_pylist(rows, schema=schemas.GROUP).append_column(SAMPLED, pa.array([sampled] * len(rows)))


def test_engines_fill_a_group_one_after_the_other() -> None:
    mixed = config(MIXED, "generation.num_candidates=2")
    names = [f"p{i}" for i in range(200)]
    first, second = Engine(mixed, 0), Engine(mixed, 1)
    rows = second(first(groups(*names))).to_pylist()
    policy = policy_of(mixed)
    for row in rows:
        expected = [m.name for m, start, end in policy.shares(row["prompt_id"], 2) for _ in range(start, end)]
        assert [c["policy"] for c in row["candidates"]] == expected
        seed = candidate_seed(0, row["prompt_id"])
        adapter = {"big": None, "plain": None, "tuned": "tuned"}
        assert [c["text"] for c in row["candidates"]] == [f"{adapter[name]} {seed + i}" for i, name in enumerate(expected)]
    seen = {c["policy"] for row in rows for c in row["candidates"]}
    assert seen == {"big", "plain", "tuned"}
    # Finished groups are counted once, by the last engine.
    assert (first.counted, second.counted) == (0, 200)
    # What is whole is neither sampled nor counted again.
    again = pa.Table.from_pylist(rows, schema=schemas.GROUP).append_column(SAMPLED, pa.array([True] * 200))
    before = first.asked, second.asked
    assert second(first(again)).equals(again)
    assert (first.asked, second.asked, second.counted) == (*before, 200)


@pytest.mark.parametrize("engine", [0, 1])
def test_a_failure_of_one_policy_fails_the_group(engine: int) -> None:
    mixed = config(MIXED, "generation.num_candidates=8")
    chain = [Engine(mixed, i, refuses="bad" if i == engine else "") for i in range(2)]
    good, bad = chain[1](chain[0](groups("fine!", "bad"))).to_pylist()
    assert (good["failure"], len(good["candidates"])) == (None, 8)
    assert (bad["failure"], bad["candidates"]) == ("generation_failed", [])
    assert bad["failure_detail"] == f"policy {['big', 'plain'][engine]}: ValueError: no"
    assert chain[1].counted == 2
    assert chain[1].asked == (2 if engine == 0 else 4)


def test_a_prompt_too_long_for_one_policy_drops_the_group_before_its_engine_is_asked() -> None:
    chain = [Engine(config(MIXED), i) for i in range(2)]
    chain[1]._renderers["tuned"] = lambda _: [0] * 2000  # type: ignore[assignment, return-value]
    (row,) = chain[1](chain[0](groups("p"))).to_pylist()
    assert (row["failure"], row["candidates"], chain[1].asked) == ("prompt_too_long", [], 0)
    assert row["failure_detail"].startswith("policy tuned: 2000 prompt tokens + max_tokens 512 > ")


def test_candidates_and_tokens_are_counted_by_policy() -> None:
    candidates = [("a", [1, 2, 3]), ("b", [1]), ("a", [])]
    rows = [
        {"text": "", "token_ids": ids, "finish_reason": "stop", "seed": 0, "logprob": 0.0, "policy": name}
        for name, ids in candidates
    ]
    counted = count_policies(pa.array(rows, schemas.CANDIDATE))
    assert counted == {"policy.a.candidates": 2, "policy.a.tokens": 3, "policy.b.candidates": 1, "policy.b.tokens": 1}
    assert count_policies(pa.array([], schemas.CANDIDATE)) == {}


def test_groups_without_the_field_policy_are_selected_from_as_before() -> None:
    old = pa.struct([field for field in schemas.CANDIDATE if field.name != "policy"])
    rows = [{"text": t, "token_ids": [1], "finish_reason": "stop", "seed": i, "logprob": -1.0} for i, t in enumerate("ab")]
    rewards = {f"reward.{name}": pa.array([[0.0, 1.0]], pa.list_(pa.float32())) for name in ("x", "y")}
    table = pa.table(
        {
            "prompt_id": ["p"],
            "prompt": pa.array([[{"role": "user", "content": "q"}]], schemas.MESSAGES),
            "candidates": pa.array([rows], pa.list_(old)),
            **rewards,
        }
    )
    selection = SelectionConfig(gap="sum")
    (pair,) = select_pairs(table, selection, fit_selection([table], selection)).pairs.to_pylist()
    assert (pair["chosen_index"], pair["rejected_index"]) == (1, 0)


def adapter(folder: Path, **options: Any) -> Path:
    import numpy as np

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **options}))
    save_file({"a": np.zeros(2, dtype=np.float32)}, folder / "adapter_model.safetensors")
    return folder


def test_lora_arguments_follow_the_adapters(tmp_path: Path) -> None:
    low, high = (str(adapter(tmp_path / str(r), r=r, rank_pattern={"q_proj": 2 * r})) for r in (4, 20))
    assert lora_arguments({"a": low}, {}, False, False) == {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    assert lora_arguments({"a": low, "b": high}, {}, False, True) == {"enable_lora": True, "max_lora_rank": 64, "max_loras": 2}
    # On CPUs, requests without an adapter take the last slot, so it must stay empty.
    assert lora_arguments({"a": low}, {}, True, False)["max_loras"] == 2
    assert lora_arguments({"a": low}, {}, True, True)["max_loras"] == 1
    assert lora_arguments({"a": low}, {"max_lora_rank": 128, "max_loras": 4}, True, False) == {
        "enable_lora": True,
        "max_lora_rank": 128,
        "max_loras": 4,
    }
    for given, on_gpu, words in (
        ({"max_lora_rank": 16}, True, "max_lora_rank = 16.*at least 40"),
        ({"max_loras": 1}, False, "max_loras = 1.*at least 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            lora_arguments({"b": high}, given, True, on_gpu)
    with pytest.raises(ConfigError, match="ranks up to 600"):
        lora_arguments({"a": str(adapter(tmp_path / "huge", r=600))}, {}, False, True)


def test_adapters_are_checked_before_anything_starts(tmp_path: Path) -> None:
    check_adapter("generation.adapter", str(adapter(tmp_path / "good")))
    with pytest.raises(ModelError, match=r"generation.adapter = .*peft_type is 'IA3', and only LORA"):
        check_adapter("generation.adapter", str(adapter(tmp_path / "ia3", peft_type="IA3")))
    with pytest.raises(ModelError, match="the folder does not exist; give the folder of a LoRA adapter"):
        check_adapter("generation.adapter", str(tmp_path / "none"))
    pickled = adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        check_adapter("generation.adapter", str(pickled))
    broken = adapter(tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json cannot be read"):
        check_adapter("generation.adapter", str(broken))


def test_a_run_goes_on_only_with_the_adapter_it_began_with(
    tmp_path: Path, tiny_policy: Path, tiny_rewards: dict[str, Path]
) -> None:
    tuned = adapter(tmp_path / "tuned")
    rewards = {name: {"kind": "classifier", "model": str(path)} for name, path in tiny_rewards.items()}
    mixed = load_config(
        BASE
        | {
            "model": str(tiny_policy),
            "output": str(tmp_path / "run"),
            "rewards": rewards,
            "generation": {
                "policies": {"plain": {}, "tuned": {"adapter": str(tuned)}, "reward": {"model": rewards["helpful"]["model"]}}
            },
        }
    )
    run = rundir.create(mixed, {})
    stages.pin_models(mixed, run)
    assert set(run.manifest()["models"]) == {str(tiny_policy), str(tuned), *(r["model"] for r in rewards.values())}
    stages.pin_models(mixed, run)
    (tuned / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(ResumeError, match=f"the run began with other models \\({tuned}: sha:"):
        stages.pin_models(mixed, run)


def test_models_of_the_hub_are_those_that_the_run_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(
        BASE
        | {
            "model": "org/policy",
            "output": str(tmp_path / "run"),
            "rewards": {
                "a": {"kind": "classifier", "model": "org/reward"},
                "b": {"kind": "classifier", "model": "org/other", "revision": "v2"},
                "c": {"kind": "implicit", "policy": "org/policy", "reference": "org/base"},
            },
            "generation": {"policies": {"own": {}, "large": {"model": "org/large"}}},
            "training": {"reference": {"model": "org/base"}},
        }
    )
    run = rundir.create(config, {})
    for number in ("1", "2"):  # by the second time, all of them moved on
        monkeypatch.setattr(stages, "model_identity", lambda name, revision, _, n=number: f"hub:{revision or name[4:] + n}")
        pinned = stages.pin_models(config, run)
        assert pinned.revision == "policy1"
        assert {name: policy.revision for name, policy in pinned.generation.policies.items()} == {
            "own": None,
            "large": "large1",
        }
        assert pinned.training.reference.revision == "base1"
        assert [pinned.rewards[name].revision for name in "ab"] == ["reward1", "v2"]
        assert (pinned.rewards["c"].policy_revision, pinned.rewards["c"].reference_revision) == ("policy1", "base1")
    assert run.manifest()["models"]["org/policy"] == "hub:policy1"
    monkeypatch.setattr(stages, "model_identity", lambda name, revision, _: "hub:main")
    assert stages.pin_models(config, rundir.create(config.model_copy(update={"output": str(tmp_path / "new")}), {})) == config


def test_an_adapter_of_the_hub_that_has_moved_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"generation": {"policies": {"own": {}, "tuned": {"adapter": "org/lora"}}}, "output": str(tmp_path / "run")}
    config = load_config(BASE | {"model": "org/policy"} | options)
    run = rundir.create(config, {})
    for number, outcome in (
        ("1", contextlib.nullcontext()),
        ("2", pytest.raises(ResumeError, match="org/lora: hub:lora1 -> hub:lora2")),
    ):
        monkeypatch.setattr(stages, "model_identity", lambda name, revision, _, n=number: f"hub:{revision or name[4:] + n}")
        with outcome:
            assert stages.pin_models(config, run).revision == "policy1"
