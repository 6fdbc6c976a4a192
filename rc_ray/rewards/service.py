"""Questions to a service over HTTP: JSON out and in, with retries, checked certificates and a token that shows nowhere.

What is transient (a failed connection, a timeout, status 429, 500, 502, 503, 504) is tried again with growing waits, by urllib3, and what broke
off later by ourselves. Requests can be limited per minute, repetitions among them.
Invariant: a question ends with an answer or with a `ServiceError` that says why; no message holds the token or what the service sent.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rc_ray.config.rewards import ServiceReward
from rc_ray.errors import ConfigError

TRANSIENT = (429, 500, 502, 503, 504)
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 120.0
T = TypeVar("T")
R = TypeVar("R")


class ServiceError(RuntimeError):
    """A service gave no usable answer."""


class _Bearer:
    """Adds the token to a request; as `auth`, so that no .netrc takes its place."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Pace:
    """Lets requests begin at even distances, from whichever thread they come.

    Args:
        per_minute: None lets all of them begin at once.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._distance_s = 60 / per_minute if per_minute is not None else 0.0
        self._next_s = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Returns when the next request may begin."""
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next_s)
            self._next_s = begin + self._distance_s
        time.sleep(begin - now)


class Service:
    """One address, asked over several connections.

    Args:
        first_wait_s: before the second repetition of a request; it doubles from there.

    Attributes:
        num_requests: questions of `map` that have ended, with an answer or without one.

    Raises:
        ConfigError: the token's environment variable is not set here.
    """

    def __init__(self, config: ServiceReward, first_wait_s: float = FIRST_WAIT_S) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        assert config.url is not None
        self._config, self._first_wait_s = config, first_wait_s
        self.url = urlsplit(config.url)._replace(query="", fragment="").geturl()  # a query may hold a key
        self._pace = pace = Pace(config.max_requests_per_minute)
        self._lock = threading.Lock()
        self.num_requests = 0
        self._session = requests.Session()
        self._verify = config.ca_file  # the session's would give way to REQUESTS_CA_BUNDLE
        if config.token_env is not None:
            token = os.environ.get(config.token_env)
            if not token:
                raise ConfigError(
                    f"token_env = {config.token_env!r}: the environment variable is not set on node {os.uname().nodename}; set it on every node "
                    "before Ray is started there"
                )
            self._session.auth = _Bearer(token)

        class PacedRetry(Retry):
            def parse_retry_after(self, retry_after: str) -> float:
                """Seconds to wait; fractions, which some services send, are not an error."""
                try:
                    return min(max(float(retry_after), 0.0), LONGEST_WAIT_S)
                except ValueError:
                    return float(super().parse_retry_after(retry_after))

            def sleep(self, response: Any = None) -> None:
                super().sleep(response)
                pace.wait()

        retry = PacedRetry(
            total=config.max_retries,
            status_forcelist=TRANSIENT,
            allowed_methods=None,  # POST, too: a score may be asked for twice
            backoff_factor=first_wait_s / 2,
            backoff_max=LONGEST_WAIT_S,
            retry_after_max=int(LONGEST_WAIT_S),
            raise_on_status=False,
        )
        adapter = HTTPAdapter(max_retries=retry, pool_maxsize=config.num_connections)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def ask(self, question: dict[str, Any]) -> Any:
        """The JSON value that the service answers with.

        Raises:
            ServiceError: it does not, in the end.
        """
        config = self._config
        for repetition in range(config.max_retries + 1):
            self._pace.wait()
            response = self._post(question, last=repetition == config.max_retries)
            if response is not None:
                break
            time.sleep(min(self._first_wait_s * 2**repetition, LONGEST_WAIT_S))
        if response.status_code != 200:
            repeated = f", with {config.max_retries} repetitions" if response.status_code in TRANSIENT else ""
            raise ServiceError(f"{self.url}: status {response.status_code}{repeated}")
        try:
            return response.json()
        except ValueError:
            raise ServiceError(f"{self.url}: the answer is no JSON") from None

    def _post(self, question: dict[str, Any], last: bool) -> Any:
        """A response, after the repetitions that urllib3 makes until one begins; None when it broke off, unless this was the last chance."""
        import requests
        from urllib3.exceptions import MaxRetryError

        try:
            # Not where another address sends it: that would be a GET, and the token is for this one.
            return self._session.post(
                self._config.url, json=question, timeout=self._config.timeout_s, allow_redirects=False, verify=self._verify
            )
        except requests.RequestException as error:
            broke_off = isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError))
            if broke_off and not last and not any(isinstance(cause, MaxRetryError) for cause in error.args):
                return None
            raise ServiceError(f"{self.url}: {type(error).__name__}, with {self._config.max_retries} repetitions") from None

    def map(self, ask: Callable[[T], R], questions: Sequence[T]) -> list[R]:
        """`ask` of every question, over `num_connections` connections, in order."""

        def counted(question: T) -> R:
            try:
                return ask(question)
            finally:
                with self._lock:
                    self.num_requests += 1

        with ThreadPoolExecutor(self._config.num_connections) as pool:
            return list(pool.map(counted, questions))
