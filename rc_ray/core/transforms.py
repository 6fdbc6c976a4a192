"""What selection compares in the place of rewards: their transforms, and one value of several rewards where an objective takes it.

    values = derive({"a": a, "b": b}, config, config.judges_of(objectives), fitted.transforms)

With reward r of one column, all candidates of the data as the population:

    zscore     (r - mean) / standard deviation, both correctly rounded (`measure.Summary`)
    lsc        log sigmoid(r - reference); Wang et al., "Transforming and Combining Rewards", arXiv 2402.00742, whose reference is a high
               quantile of the rewards of each prompt; here it is one number, given or a quantile of the sample
    quantile   (number below r + half the number equal to r) / number, on the sample; linear between its knots, 0 and 1 at the ends of the data
    clip       the nearest value in the limits, after any of these

The sample is the `SAMPLE_GROUPS` groups whose prompts hash lowest, so it does not depend on the order of the data. A quantile has the standard
error of a share among them (at most 0.5 / sqrt(candidates in it)) and up to `NUM_KNOTS` different rewards it is exact on the sample; beyond,
knots are 1 / (`NUM_KNOTS` - 1) of it apart.

Invariant: a transform never turns two rewards round; it makes them equal only beyond a clip's limits, beyond the data that a quantile was
fitted to, or where float64 cannot tell their values apart. What is missing or not finite stays missing (NaN).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rc_ray.config import SelectionConfig, TransformConfig
from rc_ray.core.compiled import compiled

Array = NDArray[np.float64]
Parameters = dict[str, Any]
SAMPLE_GROUPS = 4096
NUM_KNOTS = 257


def derive(
    rewards: Mapping[str, NDArray[np.floating[Any]]],
    config: SelectionConfig,
    judges: Iterable[str],
    fitted: Mapping[str, Parameters] | None,
) -> dict[str, Array]:
    """The values that are compared.

    Args:
        rewards: by column, all of one length.
        config: transforms and ensembles.
        judges: what to compute, see `SelectionConfig.judges_of`.
        fitted: parameters by column for transforms that are fitted; empty ones leave a column as it is, since nothing is known of it.
    """
    known = fitted or {}

    def transformed(column: str) -> Array:
        values = rewards[column].astype(np.float64)
        values[~np.isfinite(values)] = np.nan
        transform = config.transforms.get(column)
        if transform is None:
            return values
        return _apply(values, transform, known[column] if transform.needs_fit else None)

    values: dict[str, Array] = {}
    for name in judges:
        ensemble = config.ensembles.get(name)
        if ensemble is None:
            values[name] = transformed(name)
        else:
            values[name] = _combine([transformed(member) for member in ensemble.members], ensemble.combine)
    return values


def _combine(members: list[Array], how: str) -> Array:
    first, *others = members
    for other in others:
        first = np.minimum(first, other) if how == "minimum" else first + other
    return first if how == "minimum" else first / len(members)


def _apply(values: Array, transform: TransformConfig, fitted: Parameters | None) -> Array:
    if fitted is not None and not fitted:
        return values
    if transform.kind == "zscore":
        assert fitted is not None
        values = (values - fitted["mean"]) / fitted["deviation"]
    elif transform.kind == "lsc":
        values = _log_sigmoids(values, transform.reference if fitted is None else fitted["reference"])
    elif transform.kind == "quantile":
        assert fitted is not None
        values = _shares(values, np.asarray(fitted["knots"]), np.asarray(fitted["shares"]))
    return values if transform.clip is None else np.clip(values, *transform.clip)


@compiled
def _log_sigmoids(values: Any, reference: Any) -> Any:
    """log sigmoid(value - reference); one value at a time, so that a value does not depend on its place."""
    result = np.empty(values.size)
    for i in range(values.size):
        x = values[i] - reference
        result[i] = min(x, 0.0) - np.log1p(np.exp(-abs(x)))
    return result


def _shares(values: Array, knots: Array, shares: Array) -> Array:
    """Linear between the knots; beyond them, as at the last one."""
    if knots.size == 1:
        return np.where(np.isnan(values), np.nan, shares[0])
    inside = np.clip(values, knots[0], knots[-1])
    left = np.clip(np.searchsorted(knots, inside, side="right") - 1, 0, knots.size - 2)
    width, rise = knots[left + 1] - knots[left], shares[left + 1] - shares[left]
    # At most the share of the right knot, which rounding could pass; so larger values never get smaller shares.
    between = np.minimum(shares[left] + (inside - knots[left]) / width * rise, shares[left + 1])
    return np.where(inside == knots[left + 1], shares[left + 1], between)


def fit_shares(sample: Array, lowest: float, highest: float) -> Parameters:
    """Knots of a quantile transform.

    Args:
        sample: (n,) rewards; with none, nothing is known.
        lowest, highest: of all the data.
    """
    if not sample.size:
        return {}
    ordered = np.sort(sample + 0.0)  # -0.0 is 0.0
    knots = np.unique(ordered)
    if knots.size > NUM_KNOTS:
        knots = np.unique(ordered[np.linspace(0, ordered.size - 1, NUM_KNOTS).round().astype(np.int64)])
    below, up_to = (np.searchsorted(ordered, knots, side=side) for side in ("left", "right"))
    shares = (below + up_to) / 2 / ordered.size
    points = list(zip(knots.tolist(), shares.tolist(), strict=True))
    if lowest < points[0][0]:
        points.insert(0, (lowest, 0.0))
    if highest > points[-1][0]:
        points.append((highest, 1.0))
    return {"knots": [knot for knot, _ in points], "shares": [share for _, share in points]}
