"""A reward that is a class in the user's own file: how it is found, checked, sent and identified, and what it may return."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from rc_ray.config import Config, CustomReward, differences, load_config, result_fields, to_yaml
from rc_ray.core.ids import Message
from rc_ray.errors import ConfigError, ResumeError
from rc_ray.ledger import rundir
from rc_ray.pipeline import fork
from rc_ray.pipeline.stages import check_rewards
from rc_ray.rewards.base import Score, build_reward
from rc_ray.rewards.code import load_code, read_code
from tests.unit.test_config import GOOD

PROMPT: list[Message] = [{"role": "user", "content": "hello"}]
BRIEF = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Brief:
    target_words: int
    device: str = "unset"
    num_threads: int = 0

    def score(self, prompts, answers):
        return [-abs(len(answer.split()) - self.target_words) for answer in answers]

    def figures(self):
        return {"num_texts": 7}
"""


def written(folder: Path, code: str = BRIEF, name: str = "mine.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(code)
    return folder / name


def config_with(class_path: str, **args: Any) -> Config:
    return load_config({**GOOD, "rewards": {**GOOD["rewards"], "brief": {"kind": "custom", "class": class_path, "args": args}}})


def checked(config: Config) -> dict[str, str]:
    """The check of this objective; the others' models are on the Hub."""
    return check_rewards(config.model_copy(update={"rewards": {"brief": config.rewards["brief"]}}))


def custom(class_path: str, content: bytes | None = None, on_gpu: bool = False, **args: Any) -> Any:
    config = CustomReward.model_validate({"kind": "custom", "class": class_path, "args": args})
    return build_reward(config, on_gpu, 3, content)


def test_a_class_in_a_file_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path)
    reward = custom(f"{file}:Brief", target_words=2)
    assert reward.score([PROMPT] * 3, ["a b", "a", "a b c d"]) == [Score(0.0), Score(-1.0), Score(-2.0)]
    assert reward.figures() == {"num_texts": 7}
    monkeypatch.chdir(tmp_path)
    assert custom("mine.py:Brief", target_words=1).score([PROMPT], ["a b"]) == [Score(-1.0)]


def test_what_it_names_of_the_place_is_given_unless_it_is_configured(tmp_path: Path) -> None:
    path = f"{written(tmp_path)}:Brief"
    made = [custom(path, on_gpu=on_gpu, target_words=1)._reward for on_gpu in (False, True)]
    assert [(m.device, m.num_threads) for m in made] == [("cpu", 3), ("cuda", 3)]
    assert custom(path, target_words=1, device="meta")._reward.device == "meta"
    plain = written(tmp_path, "class Plain:\n    def score(self, prompts, answers): return [0] * len(answers)\n", "plain.py")
    assert custom(f"{plain}:Plain").score([PROMPT], ["a"]) == [Score(0.0)]
    assert custom(f"{plain}:Plain").figures() == {}


def test_the_file_is_run_from_what_the_driver_sent(tmp_path: Path) -> None:
    path = f"{tmp_path}/absent.py:Brief"
    assert custom(path, BRIEF.encode(), target_words=1).score([PROMPT], ["a"]) == [Score(0.0)]
    file = written(tmp_path, BRIEF)
    sent = read_code("class", f"{file}:Brief")
    file.write_text(BRIEF.replace("-abs", "abs"))
    assert custom(f"{file}:Brief", sent, target_words=1).score([PROMPT], ["a b"]) == [Score(-1.0)]
    assert custom(f"{file}:Brief", target_words=1).score([PROMPT], ["a b"]) == [Score(1.0)]


def test_a_module_must_be_what_the_driver_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, name="custom_module_of_mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    path = "custom_module_of_mine:Brief"
    sent = read_code("class", path)
    assert sent == BRIEF.encode()
    assert custom(path, sent, target_words=1).score([PROMPT], ["a"]) == [Score(0.0)]
    file.write_text(BRIEF + "\n")
    with pytest.raises(ConfigError, match=r"custom_module_of_mine\.py on node .* is not what the driver read"):
        custom(path, sent, target_words=1)


@pytest.mark.parametrize(
    ("code", "name", "args", "words"),
    [
        (None, "Brief", {}, ["No such file or directory", "mine.py", "folder that the command is called from"]),
        ("class Brief(:", "Brief", {}, ["importing", "SyntaxError"]),
        ("import no_such_module_xyz", "Brief", {}, ["no_such_module_xyz", "importable on every node"]),
        ("raise RuntimeError('on purpose')", "Brief", {}, ["RuntimeError: on purpose"]),
        (BRIEF, "Breif", {}, ["no 'Breif'", "check the name"]),
        (BRIEF, "dataclasses", {}, ["no class"]),
        ("class Brief: pass", "Brief", {}, ["no method `score`", "score(self, prompts, answers)"]),
        ("class Brief:\n    score = 3", "Brief", {}, ["no method `score`"]),
        ("class Brief:\n    def score(self, answers): ...", "Brief", {}, ["its `score`", "score(self, prompts, answers)"]),
        (BRIEF, "Brief", {}, ["target_words", "`__init__`"]),
        (BRIEF, "Brief", {"target_words": 1, "words": 2}, ["'words'", "`__init__`"]),
    ],
)
def test_what_cannot_be_used_is_a_configuration_error(
    code: str | None, name: str, args: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py" if code is None else written(tmp_path, code)
    with pytest.raises(ConfigError) as caught:
        checked(config_with(f"{file}:{name}", **args))
    for word in [*words, f"rewards.brief.class = '{file}:{name}'"]:
        assert word in str(caught.value)


def test_checking_makes_no_object(tmp_path: Path) -> None:
    file = written(tmp_path, "class Heavy:\n    def __init__(self): 1 / 0\n    def score(self, prompts, answers): ...\n")
    assert list(checked(config_with(f"{file}:Heavy"))) == ["rewards.brief.class"]
    with pytest.raises(ZeroDivisionError):
        custom(f"{file}:Heavy")


@pytest.mark.parametrize("path", ["mine.py", "mine.py:", ":Brief", "a-b:Brief", "mine.py:a.b", "folder/.py:Brief"])
def test_a_class_is_named_by_file_or_module(path: str) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.brief\.class = .*must be `path/to/file\.py:ClassName`"):
        config_with(path)


@pytest.mark.parametrize("static", [False, True])
def test_values_are_read_as_those_of_a_rule(static: bool, tmp_path: Path) -> None:
    code = """
from rc_ray.rewards.base import Score
VALUES = {"none": None, "nan": float("nan"), "word": "0.5", "why": Score(None, "no opinion"), "empty": Score(None),
          "score": Score(0.25), "infinite": Score(float("inf")), "number": 1}
class Odd:
    def score(self, prompts, answers):
        if "boom" in answers:
            raise KeyError("no such field")
        return [VALUES[answer] for answer in answers if answer != "skip"]
"""
    if static:
        code = code.replace("    def score(self, ", "    @staticmethod\n    def score(")
    reward = custom(f"{written(tmp_path, code)}:Odd")
    names = ["none", "nan", "word", "why", "empty", "score", "infinite", "number"]
    scores = reward.score([PROMPT] * len(names), names)
    assert [s.value for s in scores] == [None, None, None, None, None, 0.25, None, 1.0]
    assert [s.missing for s in scores] == [
        "no score returned", "score is nan", "score is '0.5', not a number", "no opinion", "no score returned", "", "score is inf", "",
    ]  # fmt: skip
    assert all(s.value is None or math.isfinite(s.value) for s in scores)
    with pytest.raises(KeyError, match="no such field"):
        reward.score([PROMPT], ["boom"])
    with pytest.raises(ValueError, match="Odd returned 1 values for 2 answers"):
        reward.score([PROMPT] * 2, ["number", "skip"])


def test_the_key_is_class_wherever_a_configuration_is_written(tmp_path: Path) -> None:
    config = config_with("mine.py:Brief", target_words=3)
    assert yaml.safe_load(to_yaml(config))["rewards"]["brief"]["class"] == "mine.py:Brief"
    assert load_config(yaml.safe_load(to_yaml(config))) == config
    assert load_config(config) == config
    other = load_config(config, ["rewards.brief.class=other.py:Brief"])
    changed = differences(result_fields(config), result_fields(other))
    assert changed == ["rewards.brief.class: 'mine.py:Brief' -> 'other.py:Brief'"]
    with pytest.raises(ConfigError, match=r"rewards\.brief\.class: missing"):
        load_config(config, ["rewards.brief={kind: custom}"])


def test_another_content_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "code", name="code_of_mine.py")
    (tmp_path / "code" / "rule_of_mine.py").write_text("def one(prompts, answers): return [1] * len(answers)\n")
    monkeypatch.syspath_prepend(tmp_path / "code")
    config = config_with(f"{file}:Brief", target_words=1)
    rewards = load_config(config, ["rewards.one={kind: rule, function: 'rule_of_mine:one'}"]).rewards
    config = config.model_copy(update={"output": str(tmp_path / "run"), "rewards": {n: rewards[n] for n in ("brief", "one")}})
    code = check_rewards(config)
    assert set(code) == {"rewards.brief.class", "rewards.one.function"}
    before = {"prompts": "1234", **code}
    rundir.create(config, before)
    (tmp_path / "code" / "rule_of_mine.py").write_text("def one(prompts, answers): return [2] * len(answers)\n")
    after = {"prompts": "1234", **check_rewards(config)}
    assert after["rewards.brief.class"] == before["rewards.brief.class"]
    with pytest.raises(ResumeError) as caught:
        rundir.check_owner(config, after)
    (line,) = str(caught.value).splitlines()[1:-1]
    name = "rewards.one.function"
    assert line == f"  content of {name}: {before[name]} -> {after[name]}"
    # A fork keeps the rewards whose code is the same, and none of them where rewards decide what is sampled.
    fields = result_fields(config)
    assert fork._check(fields, fields, before, before, "old") == ["brief", "one"]
    assert fork._check(fields, fields, before, after, "old") == ["brief"]
    assert fork._check(fields, fields, {"prompts": "1234"}, after, "old") == ["brief", "one"]
    adaptive = {**fields, "generation": {**fields["generation"], "max_candidates": 16}}
    with pytest.raises(ConfigError, match=rf"(?s)not those.*content of {name}"):
        fork._check(adaptive, adaptive, before, after, "old")


def test_a_run_of_an_earlier_version_resumes_and_records_the_code_from_then_on(tmp_path: Path) -> None:
    file = written(tmp_path)
    config = config_with(f"{file}:Brief", target_words=1).model_copy(update={"output": str(tmp_path / "run")})
    rundir.create(config, {"prompts": "1234"})
    hashes = {"prompts": "1234", **checked(config)}
    assert rundir.check_owner(config, hashes)
    assert rundir.create(config, hashes).manifest()["data_hashes"] == hashes
    file.write_text(BRIEF + "\n# edited\n")
    with pytest.raises(ResumeError, match=r"content of rewards\.brief\.class"):
        rundir.check_owner(config, {"prompts": "1234", **checked(config)})


def test_the_packages_own_rules_and_what_has_no_file_are_not_hashed() -> None:
    assert read_code("f", "rc_ray.rewards.rules:length_near") is None
    assert read_code("f", "sys:exit") is None
    assert load_code("f", "rc_ray.rewards.rules:length_near", None).__name__ == "length_near"
