"""Rewards from a service: what goes over the wire, and every way in which a service fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rc_ray.config import HttpReward, load_config, to_yaml
from rc_ray.errors import ConfigError
from rc_ray.rewards.base import Score, build_reward
from rc_ray.rewards.http import HttpRewardService
from tests.unit.test_config import GOOD

Answer = tuple[int, bytes, dict[str, str]]
SECRET = "s3cr3t-t0ken"


class Service:
    """An HTTP server whose answers are scripted; the last one is repeated. None: it waits longer than anybody."""

    def __init__(self) -> None:
        self.script: list[Answer | None] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append(body)
                service.headers.append(dict(self.headers))
                answer = (
                    service.script.pop(0)
                    if len(service.script) > 1
                    else service.script[0]
                    if service.script
                    else (200, b"", {})
                )
                if answer is None:
                    time.sleep(1.5)
                    return
                status, content, headers = answer
                if status == 200 and not content:
                    content = json.dumps({"scores": [float(len(item["answer"])) for item in body["items"]]}).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    found = Service()
    yield found
    found.stop()


def ask(service: Service, answers: list[str], **options: Any) -> list[Score]:
    config = HttpReward(kind="http", url=service.url, **{"max_retries": 2, "timeout_s": 0.5, **options})
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(len(answers))]
    return HttpRewardService(config, first_wait_s=0.01).score(prompts, answers)


def ok(scores: Any) -> Answer:
    return 200, json.dumps({"scores": scores}).encode(), {}


def test_every_answer_gets_its_own_score_whatever_the_batches(service: Service) -> None:
    answers = ["x" * n for n in range(25)]
    scores = ask(service, answers, batch_size=4, num_connections=3)
    assert [s.value for s in scores] == [float(n) for n in range(25)]
    assert sorted(len(request["items"]) for request in service.requests) == [1, 4, 4, 4, 4, 4, 4]
    first = next(r for r in service.requests if r["items"][0]["answer"] == "")
    assert first["items"][1] == {"prompt": [{"role": "user", "content": "question 1"}], "answer": "x"}
    assert "Authorization" not in service.headers[0]
    assert ask(service, []) == []


@pytest.mark.parametrize(
    "passing",
    [None, (429, b"", {"Retry-After": "0"}), (500, b"oops", {}), (502, b"", {}), (503, b"", {}), (504, b"", {})],
    ids=["timeout", "429", "500", "502", "503", "504"],
)
def test_what_passes_is_asked_again(service: Service, passing: Answer | None) -> None:
    service.script = [passing, passing, ok([1.5, -2])]
    assert ask(service, ["a", "b"]) == [Score(1.5), Score(-2.0)]
    assert len(service.requests) == 3
    assert service.requests[0] == service.requests[2]


@pytest.mark.parametrize(
    ("answer", "requests", "words"),
    [
        (None, 3, "2 repetitions"),
        ((429, b"", {"Retry-After": "0"}), 3, "status 429, with 2 repetitions"),
        ((500, b"", {}), 3, "status 500, with 2 repetitions"),
        ((401, b"", {}), 1, "status 401"),
        ((302, b"", {"Location": "http://127.0.0.1:1/elsewhere"}), 1, "status 302"),
        ((200, b"<html>", {}), 1, "no JSON object with `scores`"),
        ((200, b'{"score": 1}', {}), 1, "no JSON object with `scores`"),
        ((200, b"[1, 2]", {}), 1, "no JSON object with `scores`"),
        (ok(5), 1, "`scores` is a int, not a list"),
        (ok([1.0]), 1, "1 scores for 2 answers"),
        (ok([1.0, 2.0, 3.0]), 1, "3 scores for 2 answers"),
    ],
)
def test_what_stays_wrong_makes_all_scores_of_the_request_missing(
    service: Service, answer: Answer | None, requests: int, words: str
) -> None:
    service.script = [answer]
    scores = ask(service, ["a", "b"])
    assert [s.value for s in scores] == [None, None]
    assert all(words in s.missing and service.url in s.missing for s in scores)
    assert len(service.requests) == requests


def test_other_requests_are_not_touched_by_one_that_fails(service: Service) -> None:
    service.script = [(400, b"", {}), (200, b"", {})]
    scores = ask(service, ["a", "bb", "ccc"], batch_size=1, num_connections=1)
    assert [s.value for s in scores] == [None, 2.0, 3.0]


def test_single_values_that_are_no_numbers_are_missing(service: Service) -> None:
    service.script = [(200, b'{"scores": [1, null, NaN, Infinity, "2", true, 1e300, -0.5]}', {})]
    scores = ask(service, list("abcdefgh"))
    assert [s.value for s in scores] == [1.0, None, None, None, None, None, None, -0.5]
    assert scores[2].missing == "score is nan"
    assert all(s.missing for s in scores if s.value is None)


def test_nobody_there_is_a_reason_and_no_score() -> None:
    gone = Service()
    gone.stop()
    (score,) = ask(gone, ["a"])
    assert score.value is None
    assert "ConnectionError" in score.missing


def test_the_token_reaches_the_service_and_nothing_else(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    service.script = [(401, SECRET.encode(), {})]
    (score,) = ask(service, ["a"], token_env="MY_TOKEN")
    assert service.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in score.missing
    config = load_config(GOOD, [f"rewards.length={{kind: http, url: '{service.url}', token_env: MY_TOKEN}}"])
    assert SECRET not in to_yaml(config)
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ConfigError, match=r"MY_TOKEN.*not set on node"):
        build_reward(config.rewards["length"], on_gpu=False, num_threads=1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("url: 'ftp://host/x'", "https:// or http://"),
        ("url: 'https://'", "name a host"),
        (f"url: 'https://me:{SECRET}@host/x'", "token_env"),
        ("url: 'http://host/x', token_env: T", "use https://"),
        (f"url: 'https://host/x', token: {SECRET}", "unknown key"),
    ],
)
def test_unsafe_configurations_are_refused_without_repeating_a_secret(given: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(GOOD, [f"rewards.length={{kind: http, {given}}}"])
    assert words in str(caught.value)
    assert "rewards.length" in str(caught.value)
    assert SECRET not in str(caught.value)
