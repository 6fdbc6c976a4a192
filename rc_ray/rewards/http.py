"""Rewards from a service: JSON out, scores in.

What is transient (a failed connection, a timeout, status 429, 500, 502, 503, 504) is tried again with growing waits, by urllib3. What stays wrong
makes the scores of that request missing, with the reason. Invariant: no score is invented, and the token is in no message.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rc_ray.config import HttpReward
from rc_ray.core.ids import Message
from rc_ray.errors import ConfigError
from rc_ray.rewards.base import Score

TRANSIENT = (429, 500, 502, 503, 504)
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 120.0


class _Bearer:
    """Adds the token to a request; as `auth`, so that no .netrc takes its place."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class HttpRewardService:
    """One service, asked over several connections.

    Args:
        first_wait_s: before the second repetition of a request; it doubles from there.

    Raises:
        ConfigError: the token's environment variable is not set here.
    """

    def __init__(self, config: HttpReward, first_wait_s: float = FIRST_WAIT_S) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        self._config = config
        self._session = requests.Session()
        self._session.verify = config.ca_file or True
        if config.token_env is not None:
            token = os.environ.get(config.token_env)
            if not token:
                raise ConfigError(
                    f"token_env = {config.token_env!r}: the environment variable is not set on node {os.uname().nodename}; set it on every node "
                    "before Ray is started there"
                )
            self._session.auth = _Bearer(token)
        retry = Retry(
            total=config.max_retries,
            status_forcelist=TRANSIENT,
            allowed_methods=None,  # POST, too: a score may be asked for twice
            backoff_factor=first_wait_s / 2,
            backoff_max=LONGEST_WAIT_S,
            raise_on_status=False,
        )
        adapter = HTTPAdapter(max_retries=retry, pool_maxsize=config.num_connections)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def score(self, prompts: list[list[Message]], answers: list[str]) -> list[Score]:
        """See `Reward.score`."""
        size = self._config.batch_size
        items = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        with ThreadPoolExecutor(self._config.num_connections) as pool:
            return [score for scores in pool.map(self._ask, batches) for score in scores]

    def _ask(self, items: list[dict[str, Any]]) -> list[Score]:
        """The scores of one request."""
        import requests

        try:
            # Not where another address sends it: that would be a GET, and the token is for this one.
            response = self._session.post(
                self._config.url, json={"items": items}, timeout=self._config.timeout_s, allow_redirects=False
            )
        except requests.RequestException as error:
            return self._missing(items, f"{type(error).__name__}, with {self._config.max_retries} repetitions")
        if response.status_code in TRANSIENT:
            return self._missing(items, f"status {response.status_code}, with {self._config.max_retries} repetitions")
        if response.status_code != 200:
            return self._missing(items, f"status {response.status_code}")
        try:
            values = response.json()["scores"]
        except (ValueError, TypeError, KeyError):
            return self._missing(items, "the answer is no JSON object with `scores`")
        if not isinstance(values, list):
            return self._missing(items, f"`scores` is a {type(values).__name__}, not a list")
        if len(values) != len(items):
            return self._missing(items, f"{len(values)} scores for {len(items)} answers")
        return [Score.checked(None if isinstance(value, bool) else value) for value in values]

    def _missing(self, items: list[dict[str, Any]], why: str) -> list[Score]:
        return [Score(None, f"{self._config.url}: {why}")] * len(items)
