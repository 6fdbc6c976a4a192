"""What is counted about engines: quantiles within five per cent, sums over engines, and times when they hold little."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rc_ray.generation.load import Load, load_line


def test_quantiles_are_right_within_five_per_cent_and_the_longest_exactly() -> None:
    seconds = np.random.default_rng(0).lognormal(1.0, 1.0, 5000)
    parts = [Load(), Load()]
    for number, value in enumerate(seconds):
        parts[number % 2].add_group(float(value))
    load = parts[0] + parts[1]
    for share in (0.01, 0.5, 0.9, 0.99):
        assert load.quantile_s(share) == pytest.approx(np.quantile(seconds, share, method="inverted_cdf"), rel=0.05)
    assert load.longest_s == seconds.max()
    assert sum(load.counts.values()) == 5000


def test_no_time_at_all_and_no_group_at_all() -> None:
    load = Load()
    assert load.summary() == {"group_p50_s": 0.0, "group_p99_s": 0.0, "group_max_s": 0.0, "thin_share": 0.0}
    load.add_group(0.0)
    assert load.quantile_s(0.5) == 0.0


def test_time_counts_from_the_first_group_and_is_thin_below_a_quarter_of_the_most() -> None:
    load = Load()
    load.add_time(100, held=0, most=0)  # before the first group
    for seconds, held in ((6, 8), (2, 2), (1, 1), (1, 0)):
        load.add_time(seconds, held, most=8)
    assert (load.engine_s, load.thin_s) == (10, 2)
    assert load.summary()["thin_share"] == 0.2
    assert "20% of the engines' time" in load_line(load.summary())


def test_it_goes_through_json() -> None:
    load = Load()
    for seconds in (0.01, 0.5, 0.5, 70):
        load.add_group(seconds)
    load.add_time(5, 1, 8)
    assert Load.from_dict(json.loads(json.dumps(load.as_dict()))) == load
