"""A judge that compares the answers of a group with each other: what is asked, what counts, what is left out, and where it makes no sense."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rc_ray.config import JudgeReward, load_config
from rc_ray.core import schemas
from rc_ray.errors import ConfigError, ModelError
from rc_ray.pipeline.actors import ScoreGroups
from rc_ray.pipeline.stages import check_rewards
from rc_ray.rewards.base import Score
from rc_ray.rewards.chat import EndpointChat
from rc_ray.rewards.judge import JudgeRewardModel, pairings
from tests.unit.test_config import GOOD
from tests.unit.test_services import Answer, Service, completion, patience

Messages = list[dict[str, str]]


@pytest.fixture
def service() -> Iterator[Service]:
    found = Service()
    yield found
    found.stop()


def judge_of(service: Service, **options: Any) -> JudgeRewardModel:
    given: dict[str, Any] = {
        "kind": "judge",
        "model": "judge-1",
        "criterion": "It is brief.",
        "method": "pairwise",
        "url": service.url,
    }
    config = JudgeReward(**{**given, "max_retries": 0, **options})
    return JudgeRewardModel(config, EndpointChat(config, first_wait_s=0.01))


def group(*answers: str, question: str = "question") -> tuple[list[Messages], list[str]]:
    prompt = [{"role": "user", "content": question}]
    return [prompt] * len(answers), list(answers)


def case_of(request: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(request["messages"][1]["content"]))


def better(word: str) -> Answer:
    return completion(json.dumps({"better": word}))


def shorter(request: dict[str, Any]) -> Answer:
    """What an honest judge of brevity says."""
    first, second = (len(case_of(request)[name]) for name in ("first", "second"))
    return better("tie" if first == second else "first" if first < second else "second")


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


def test_every_two_answers_of_a_group_are_compared_in_both_orders(service: Service) -> None:
    service.script = [shorter]
    judge = judge_of(service)
    first, second = group("ccc", "a", "dddd", "bb", question="first"), group("x", "yy", question="second")
    scores = judge.score(first[0] + second[0], first[1] + second[1])
    assert values(scores) == pytest.approx([1 / 3, 1, 0, 2 / 3, 1, 0])
    asked = [(case["conversation"][0]["content"], case["first"], case["second"]) for case in map(case_of, service.requests)]
    both_orders = [("first", a, b) for a in first[1] for b in first[1] if a != b] + [
        ("second", "x", "yy"),
        ("second", "yy", "x"),
    ]
    assert sorted(asked) == sorted(both_orders)
    assert judge.figures() == {"num_requests": 14, "num_comparisons": 7, "num_order_disagreements": 0}
    request = service.requests[0]
    assert request["response_format"]["json_schema"]["schema"] == {
        "type": "object",
        "properties": {"better": {"type": "string", "enum": ["first", "second", "tie"]}},
        "required": ["better"],
        "additionalProperties": False,
    }
    task = request["messages"][0]["content"]
    assert "It is brief." in task
    assert '{"better": W}' in task
    assert request["temperature"] == 0


def test_a_judge_that_goes_by_the_place_gives_ties_and_is_seen(service: Service) -> None:
    service.script = [better("first")]
    judge = judge_of(service)
    assert values(judge.score(*group("a", "bb", "ccc"))) == [0.5, 0.5, 0.5]
    assert judge.figures() == {"num_requests": 6, "num_comparisons": 3, "num_order_disagreements": 3}


def test_a_win_in_one_order_and_a_tie_in_the_other_is_a_tie(service: Service) -> None:
    service.script = [lambda request: better("first" if case_of(request)["first"] == "a" else "tie")]
    judge = judge_of(service)
    assert values(judge.score(*group("a", "bb"))) == [0.5, 0.5]
    assert judge.figures() == {"num_requests": 2, "num_comparisons": 1, "num_order_disagreements": 1}
    service.script = [better("tie")]
    assert values(judge.score(*group("a", "bb"))) == [0.5, 0.5]
    assert judge.figures() == {"num_requests": 4, "num_comparisons": 2, "num_order_disagreements": 1}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "0 repetitions"),
        ((429, b"", {"Retry-After": "0"}), "status 429"),
        ((500, b"", {}), "status 500"),
        ((200, b"nonsense", {}), "no JSON"),
        ((200, b'{"choices": []}', {}), "no chat completion"),
        (completion("the first one"), "no JSON object with `better`"),
        (completion('{"worse": "first"}'), "no JSON object with `better`"),
        (completion('{"better": NaN}'), "none of first, second, tie"),
        (completion('{"better": ["first"]}'), "none of first, second, tie"),
        (completion('{"better": "both"}'), "none of first, second, tie"),
        (completion('{"better": "fir', "length"), "cut at max_tokens = 64"),
    ],
)
def test_a_comparison_that_fails_in_one_order_is_left_out(service: Service, answer: Answer | None, words: str) -> None:
    def reply(request: dict[str, Any]) -> Answer | None:
        return answer if case_of(request)["second"] == "bad" else shorter(request)

    service.script = [reply]
    judge = judge_of(service, **patience(answer is None))
    scores = judge.score(*group("dddd", "bad", "a", "bb"))
    assert values(scores) == [0.0, None, 1.0, 0.5]
    assert words in scores[1].missing
    assert "no comparison with a verdict in both orders" in scores[1].missing
    assert judge.figures() == {"num_requests": 12, "num_comparisons": 3, "num_order_disagreements": 0}


def test_what_passes_is_asked_again(service: Service) -> None:
    service.script = [(503, b"", {}), (429, b"", {"Retry-After": "0"}), shorter]
    assert values(judge_of(service, max_retries=2, num_connections=1).score(*group("a", "bb"))) == [1.0, 0.0]
    assert len(service.requests) == 4


def test_equal_answers_are_a_tie_that_nobody_is_asked_for(service: Service) -> None:
    service.script = [shorter]
    judge = judge_of(service)
    assert values(judge.score(*group("a", "a"))) == [0.5, 0.5]
    assert service.requests == []
    assert values(judge.score(*group("a", "bb", "a"))) == [0.75, 0.0, 0.75]
    assert len(service.requests) == 4
    assert judge.score([], []) == []


def test_an_answer_without_another_one_has_no_reward(service: Service) -> None:
    service.script = [shorter]
    (score,) = judge_of(service).score(*group("a"))
    assert score == Score(None, "no other answer of its group to compare with")
    assert service.requests == []


def groups_of(*groups: tuple[str, tuple[str, ...]]) -> pa.Table:
    unknown = {"token_ids": [], "finish_reason": "stop", "seed": 0, "logprob": 0.0, "policy": "policy"}
    rows = [
        {
            "prompt_id": f"{number:032x}",
            "prompt": [{"role": "user", "content": question}],
            "candidates": [{"text": text, **unknown} for text in answers],
            "failure": None,
            "failure_detail": None,
        }
        for number, (question, answers) in enumerate(groups)
    ]
    return pa.Table.from_pylist(rows, schema=schemas.GROUP)


@pytest.mark.parametrize("fails_together", [False, True])
def test_groups_of_a_block_stay_whole_and_apart(service: Service, fails_together: bool) -> None:
    service.script = [shorter]
    given = {"kind": "judge", "model": "m", "criterion": "It is brief.", "method": "pairwise", "url": service.url}
    scorer = ScoreGroups(
        "brief", JudgeReward(**given), content=None, on_gpu=True, num_threads=1, board=None, stage="score", max_attempts=3, first=True, last=True,
        keep_scored=False,
    )  # fmt: skip
    score: Callable[..., list[Score]] = scorer._reward.score
    if fails_together:

        def fragile(prompts: list[Messages], answers: list[str]) -> list[Score]:
            if len(answers) > 3:
                raise RuntimeError("too many at once")
            return score(prompts, answers)

        scorer._reward.score = fragile  # type: ignore[method-assign]
    # Twice the same prompt side by side, as labelled pairs and data of one's own may have it.
    block = scorer(groups_of(("same", ("a", "bbb")), ("same", ("bb", "c")), ("other", ("dd", "e", "fff"))))
    assert block.column("reward.brief").to_pylist() == [[1.0, 0.0], [0.0, 1.0], [0.5, 1.0, 0.0]]
    assert block.column("missing.brief").to_pylist() == [None, None, None]
    assert len(service.requests) == 2 * (1 + 1 + 3)


# --- which answers are compared


@given(st.integers(0, 24), st.one_of(st.none(), st.integers(1, 10).map(lambda half: 2 * half)))
def test_every_answer_has_as_many_comparisons_and_no_two_answers_meet_twice(number: int, most: int | None) -> None:
    answers = [f"answer {i % 3}" for i in range(number)]
    pairs = pairings(answers, most)
    assert pairs == pairings(list(answers), most)
    assert all(i != j for i, j in pairs)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    counts = Counter(i for pair in pairs for i in pair)
    wanted = number - 1 if most is None else min(most, number - 1)
    assert all(counts[i] == wanted for i in range(number))


def test_a_chain_of_comparisons_joins_any_two_answers_and_places_are_mixed() -> None:
    pairs = pairings([f"answer {i}" for i in range(12)], 2)
    joined = {0}
    for _ in range(12):
        joined |= {i for pair in pairs if joined & set(pair) for i in pair}
    assert joined == set(range(12))
    # Neighbours in the group, which may be of one policy, are no likelier to meet than others.
    assert sum(abs(i - j) == 1 for i, j in pairs) < 6


def test_fewer_comparisons_ask_fewer_questions(service: Service) -> None:
    service.script = [shorter]
    scores = judge_of(service, max_comparisons=2).score(*group(*("x" * n for n in range(1, 9))))
    assert len(service.requests) == 16
    assert scores[0] == Score(1.0)
    assert scores[7] == Score(0.0)
    assert all(score.value in (0.0, 0.5, 1.0) for score in scores)


# --- configuration

JUDGE = "kind: judge, model: org/judge, criterion: c"
URL = "url: 'https://host/v1/chat/completions'"


@pytest.mark.parametrize(
    ("reward", "others", "words"),
    [
        (
            f"{JUDGE}, {URL}, method: pairwise",
            ["generation.max_candidates=16"],
            ["rewards.length compares all", "fixed num_candidates"],
        ),
        (
            f"{JUDGE}, {URL}, method: pairwise",
            ["evaluation={prompts: {path: p.jsonl}}"],
            ["shares within a group", "1/2 in both"],
        ),
        (f"{JUDGE}, {URL}, method: pairwise, highest: 5", [], ["highest has no effect with method: pairwise"]),
        (f"{JUDGE}, {URL}, method: pairwise, max_comparisons: 3", [], ["max_comparisons = 3", "multiple of 2"]),
        (f"{JUDGE}, {URL}, method: yes, max_tokens: 9", [], ["max_tokens has no effect with method: yes"]),
        (f"{JUDGE}, {URL}, method: yes, lowest: 0", [], ["lowest has no effect with method: yes"]),
        (f"{JUDGE}, {URL}, max_comparisons: 4", [], ["max_comparisons has no effect with method: score"]),
        (f"{JUDGE}, {URL}, revision: abc", [], ["revision has no effect with `url`"]),
        (f"{JUDGE}, {URL}, trust_remote_code: true", [], ["trust_remote_code has no effect with `url`"]),
        (f"{JUDGE}, {URL}, engine_arguments: {{max_num_seqs: 4}}", [], ["engine_arguments has no effect with `url`"]),
        (f"{JUDGE}, token_env: JUDGE_TOKEN", [], ["token_env has no effect without `url`"]),
        (f"{JUDGE}, max_requests_per_minute: 60", [], ["max_requests_per_minute has no effect without `url`"]),
        (f"{JUDGE}, max_length: 64", [], ["max_tokens (64)", "no room for a question in max_length (64)"]),
        (
            f"{JUDGE}, engine_arguments: {{max_model_len: 64}}",
            [],
            ["engine_arguments.max_model_len is not for you to set: set `max_length`; remove it"],
        ),
        (f"{JUDGE}, engine_arguments: {{load_format: dummy}}", [], ["engine_arguments.load_format", "safetensors only"]),
        (f"{JUDGE}, engine_arguments: {{tensor_parallel_size: 2}}", [], ["needs pool.num_gpus: 2"]),
        (
            f"{JUDGE}, engine_arguments: {{tensor_parallel_size: two}}",
            [],
            ["engine_arguments.tensor_parallel_size ('two')", "whole number"],
        ),
        ("kind: http", [], ["rewards.length.url: missing"]),
    ],
)
def test_what_cannot_take_effect_is_refused(reward: str, others: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(GOOD, [f"rewards.length={{{reward}}}", *others])
    for word in words:
        assert word in str(caught.value)


def test_pairs_alone_and_a_pool_of_several_gpus_are_fine() -> None:
    pairwise = f"rewards.length={{{JUDGE}, {URL}, method: pairwise, max_comparisons: 4}}"
    load_config(GOOD, [pairwise, "training.enabled=false", "evaluation={prompts: {path: p.jsonl}}"])
    load_config(GOOD, [f"rewards.length={{{JUDGE}, engine_arguments: {{tensor_parallel_size: 2}}, pool: {{num_gpus: 2}}}}"])


def test_a_judge_that_is_loaded_here_is_checked_like_any_model(tmp_path: Path) -> None:
    rule = GOOD["rewards"]["length"]

    def config(**options: Any) -> Any:
        judge = {"kind": "judge", "model": str(tmp_path), "criterion": "c", **options}
        return load_config({**GOOD, "rewards": {"nice": judge, "length": rule}})

    assert config(revision="abc").rewards["nice"].models() == {"model": (str(tmp_path), "abc", False)}
    assert config(url="https://host/v1").rewards["nice"].models() == {}
    with pytest.raises(ModelError, match=r"rewards\.nice\.model = .* no config\.json"):
        check_rewards(config())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"rewards\.nice\.model = .*pickled weights are not read"):
        check_rewards(config())
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"rewards\.nice\.engine_arguments\.max_num_seq = 4: .* did you mean 'max_num_seqs'\?"
    ):
        check_rewards(config(engine_arguments={"max_num_seq": 4}))
    check_rewards(config(engine_arguments={"max_num_seqs": 4}))
