"""The selection section: which pairs of a group become training data.

Invariant: an option that the chosen strategy does not use is an error, so that nobody believes in an option without effect.
`OPTIONS` says which strategy uses what; formulas and sources are with the strategies in `rc_ray/core/strategies.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rc_ray.config.base import Section

Strategy = Literal[
    "rcs", "rc_all", "rc_filter", "best_worst", "best_random", "sweet_spot", "rs_dpo", "mixed", "pareto", "lsc", "map"
]  # fmt: skip
PRIMARY = "primary:"
# Scales and weights within it keep every score of float32 rewards finite.
EXTREME = 1e100
# A number that float32, which rewards are, can hold.
Reward = Annotated[float, Field(ge=-(2.0**128), le=2.0**128)]
# Gaps that are a difference of one number per candidate; the others compare pairs only.
ADDITIVE = ("sum", "standardized_sum", PRIMARY)

_RULE = frozenset({"consistency", "primary", "margins", "margin_unit", "min_agreeing"})
_GAP = frozenset({"gap", "weights"})
OPTIONS: dict[str, frozenset[str]] = {
    "rcs": _RULE | _GAP,
    "rc_all": _RULE | _GAP | {"max_pairs"},
    "rc_filter": _RULE | _GAP,
    "best_worst": _GAP,
    "best_random": _GAP | {"seed"},
    "sweet_spot": _GAP | {"rejected_at"},
    "rs_dpo": _GAP | {"max_pairs", "tau", "eta"},
    "mixed": frozenset(),
    "pareto": _GAP,
    "lsc": frozenset({"weights", "reference", "reference_quantile"}),
    "map": frozenset({"targets", "num_pilot_groups"}),
}
"""Options that each strategy uses; those not listed for any strategy apply to all."""


class EnsembleConfig(Section):
    """Several reward models for one objective."""

    members: list[str] = Field(min_length=1)
    """Reward columns that judge this objective."""

    combine: Literal["agree", "mean", "minimum"] = "agree"
    """`agree`: members are kept apart, and the objective agrees on a pair when a `share` of them does. `mean`, `minimum`: one value per
    candidate, of the members' rewards after their transforms, is judged like one reward; a missing member makes it missing."""

    share: float = Field(1.0, gt=0, le=1)
    """With `agree`: the objective agrees on a pair when at least this share of its members does."""

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> EnsembleConfig:
        if self.combine != "agree" and self.share != 1:
            raise ValueError(
                f"share has no effect with combine {self.combine}, which makes one value of all members; remove it, or use combine: agree"
            )
        return self


class TransformConfig(Section):
    """What one reward becomes before it is compared. It keeps the order of rewards; at most it makes some equal."""

    kind: Literal["identity", "zscore", "lsc", "quantile"] = "identity"
    """`identity`: r. `zscore`: (r - mean) / standard deviation over all candidates. `lsc`: log sigmoid(r - reference), nearly flat
    above the reference (arXiv 2402.00742). `quantile`: share of all candidates below r and half of those equal to it, 0 to 1; of the
    sample of them that `core/transforms.py` describes."""

    clip: tuple[Reward | None, Reward | None] | None = None
    """Lowest and highest value, applied after `kind`, in its unit; null on one side: no limit there."""

    reference: Reward | None = None
    """`lsc`: the reward from which an answer counts as good. None: the `reference_quantile` over all candidates."""

    reference_quantile: float = Field(0.85, ge=0, le=1)
    """`lsc`: quantile over all candidates that serves as reference. (Strategy `lsc` takes the one of each group.)"""

    @property
    def is_identity(self) -> bool:
        """Whether it leaves rewards as they are."""
        return self.kind == "identity" and self.clip is None

    @property
    def needs_sample(self) -> bool:
        """Whether it is fitted to a sample of the groups."""
        return self.kind == "quantile" or (self.kind == "lsc" and self.reference is None)

    @property
    def needs_fit(self) -> bool:
        """Whether a pass over all the data has to measure something first."""
        return self.kind == "zscore" or self.needs_sample

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> TransformConfig:
        given_quantile = self.reference_quantile != type(self).model_fields["reference_quantile"].default
        if self.kind != "lsc" and (self.reference is not None or given_quantile):
            option = "reference_quantile" if self.reference is None else "reference"
            raise ValueError(f"{option} has no effect with kind {self.kind}; remove it, or use kind: lsc")
        if self.reference is not None and given_quantile:
            raise ValueError("reference_quantile has no effect when reference is given; remove one of the two")
        if self.clip is None:
            return self
        low, high = (-math.inf if self.clip[0] is None else self.clip[0]), (math.inf if self.clip[1] is None else self.clip[1])
        least, most = {"lsc": (-math.inf, 0.0), "quantile": (0.0, 1.0)}.get(self.kind, (-math.inf, math.inf))
        if not low < high:
            raise ValueError(f"clip {list(self.clip)}: the lowest value must be below the highest, as in [-3, 3] or [null, 3]")
        if low <= least and high >= most:
            raise ValueError(
                f"clip {list(self.clip)} has no effect on kind {self.kind}, whose values it all holds; narrow or remove it"
            )
        if high <= least or low >= most:
            raise ValueError(
                f"clip {list(self.clip)} makes all values of kind {self.kind} equal (they are from {least:g} to {most:g}); widen it"
            )
        return self


class SelectionConfig(Section):
    """Which pairs of a group become training data. Source: Reward Consistency, arXiv 2504.11337."""

    strategy: Strategy = "rcs"
    """`rcs`: the reward-consistent (RC) pair with the largest gap. `rc_all`: every RC pair. `rc_filter`: existing pairs
    that are RC. The rest for comparison: `best_worst`, `best_random`, `sweet_spot`, `rs_dpo`, `mixed`, `pareto`, `lsc`, `map`."""

    objectives: list[str] | None = Field(None, min_length=1)
    """Objectives to select by. None: every ensemble, and every reward column that is not a member of one."""

    transforms: dict[str, TransformConfig] = {}
    """What rewards become before everything else, per reward column. Margins, scales, references, targets and gaps are
    then in that unit; the rewards written with a pair stay as they were. What is fitted to the data is kept in the manifest."""

    ensembles: dict[str, EnsembleConfig] = {}
    """Objectives that several reward columns judge. With `combine: agree`, the reward of such an objective is the mean of its members'
    rewards, each over its scale."""

    consistency: Literal["strict", "weak", "lexicographic"] = "strict"
    """`strict`: r_k(w) - r_k(l) > margin_k for every objective. `weak`: >= margin_k for every one and > for at least one.
    `lexicographic`: > for the primary objective, >= for the others."""

    primary: str | None = None
    """The primary objective of `lexicographic`."""

    margins: dict[str, float] = {}
    """Margin per objective; 0 where not given. Negative values relax the rule."""

    margin_unit: Literal["absolute", "scale"] = "absolute"
    """`absolute`: margins are in the unit of the rewards. `scale`: in multiples of the scale of the reward column."""

    min_agreeing: int | None = Field(None, ge=1)
    """How many objectives must agree (m of K). None: all."""

    gap: str = "standardized_sum"
    """How far apart winner and loser are. `sum`: weighted sum of differences. `standardized_sum`: each difference over its
    objective's scale first. `min`: the smallest, `product`: the product of the standardised differences, 0 where one is not
    positive. `primary:<objective>`: the difference of that objective. The paper's own choice is not stated in what could be
    read, hence an option."""

    weights: dict[str, float] = {}
    """Weight per objective in the gaps `sum` and `standardized_sum`, and in `lsc`; 1 where not given."""

    scale: Literal["data", "group"] | dict[str, float] = "data"
    """Scale per reward column, of its transform if it has one. `data`: standard deviation over all candidates, measured in one pass (a
    second one after transforms that need a first) and kept in the manifest. `group`: standard deviation within each group. Or given, one
    number per reward column; an ensemble with `combine: mean` or `minimum` counts as a column in the place of its members."""

    allow_truncated_winner: bool = False
    """Whether an answer with finish_reason `length` may win."""

    max_length_ratio: float | None = Field(None, gt=0)
    """Most characters of the winner over characters of the loser. None: no limit."""

    max_pairs: int | None = Field(None, ge=1)
    """Most pairs per prompt that `rc_all` and `rs_dpo` keep, largest gaps first; what is left out is counted. None: all."""

    seed: int = Field(0, ge=0, lt=1 << 63)
    """Seed of the draw in `best_random`; the draw depends on it and on the prompt alone."""

    rejected_at: float = -2.0
    """`sweet_spot` rejects the candidate nearest to mean + rejected_at x standard deviation of the group's scores."""

    tau: float = Field(1.0, gt=0)
    """`rs_dpo`: temperature, in units of the gap."""

    eta: float = Field(0.85, ge=0.5, lt=1)
    """`rs_dpo`: keep pairs with sigmoid(gap / tau) > eta."""

    reference: dict[str, float] | None = None
    """`lsc`: reference reward per objective. None: the `reference_quantile` of the group's own rewards."""

    reference_quantile: float = Field(0.85, ge=0, le=1)
    """`lsc`: quantile of the group's rewards, linear between two of them, that serves as reference."""

    targets: dict[str, float] = {}
    """`map`: mean reward to reach, per objective; objectives without one get weight 0."""

    num_pilot_groups: int = Field(1024, ge=1)
    """`map`: groups, drawn by hash of the prompt, from which the weights are computed."""

    @property
    def scale_is_given(self) -> bool:
        """Whether the scale is part of the configuration."""
        return isinstance(self.scale, dict)

    @property
    def uses_scale(self) -> bool:
        """Whether the outcome depends on a scale."""
        options = OPTIONS[self.strategy]
        by_gap = "gap" in options and self.gap in ("standardized_sum", "min", "product")
        return by_gap or (bool(self.margins) and self.margin_unit == "scale") or any(map(self.is_split, self.ensembles))

    @property
    def needs_scale_of_data(self) -> bool:
        """Whether a pass over all the data has to measure the scale."""
        return self.uses_scale and self.scale == "data"

    @property
    def derives(self) -> bool:
        """Whether anything but the rewards themselves is compared."""
        return any(not t.is_identity for t in self.transforms.values()) or not all(map(self.is_split, self.ensembles))

    @property
    def fits_transforms(self) -> bool:
        """Whether a pass over all the data has to fit a transform."""
        return any(t.needs_fit for t in self.transforms.values())

    def is_split(self, objective: str) -> bool:
        """Whether several rewards judge an objective, each for itself."""
        return objective in self.ensembles and self.ensembles[objective].combine == "agree"

    @field_validator("scale")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        for name, scale in value.items() if isinstance(value, dict) else ():
            if not 1 / EXTREME <= scale <= EXTREME:
                raise ValueError(
                    f"scale of {name} is {scale}; a scale must be positive, between {1 / EXTREME:g} and {EXTREME:g}"
                )
        return value

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not 0 <= weight <= EXTREME:
                raise ValueError(
                    f"weight of {name} is {weight}; a weight is from 0 to {EXTREME:g} (turn the reward's sign instead)"
                )
        if value and not any(value.values()):
            raise ValueError("all weights are 0; give at least one that is positive")
        return value

    @field_validator("gap")
    @classmethod
    def _known_gap(cls, value: str) -> str:
        known = ("sum", "standardized_sum", "min", "product")
        if value not in known and not (value.startswith(PRIMARY) and value != PRIMARY):
            raise ValueError(f"unknown gap; use one of {', '.join(known)}, {PRIMARY}<objective>")
        return value

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> SelectionConfig:
        used = OPTIONS[self.strategy]
        for option in sorted(frozenset().union(*OPTIONS.values()) - used):
            if getattr(self, option) != type(self).model_fields[option].get_default(call_default_factory=True):
                users = [name for name, options in OPTIONS.items() if option in options]
                raise ValueError(f"{option} has no effect with strategy {self.strategy}; remove it, or use {', '.join(users)}")
        if (self.primary is not None) != (self.consistency == "lexicographic"):
            raise ValueError("primary and consistency: lexicographic go together; set both or neither")
        if self.min_agreeing is not None and self.consistency == "lexicographic":
            raise ValueError("min_agreeing has no effect with consistency: lexicographic; remove one of the two")
        if self.strategy not in ("rcs", "rc_all", "rc_filter") and self.gap in ("min", "product"):
            raise ValueError(
                f"strategy {self.strategy} needs one score per candidate; use gap sum, standardized_sum or {PRIMARY}X"
            )
        if "gap" in used and self.weights and self.gap not in ("sum", "standardized_sum"):
            raise ValueError(f"weights have no effect with gap {self.gap}; remove them, or use sum or standardized_sum")
        if self.scale_is_given and not self.uses_scale:
            raise ValueError(f"a given scale has no effect with strategy {self.strategy} and gap {self.gap}; remove it")
        if self.reference is not None and self.reference_quantile != type(self).model_fields["reference_quantile"].default:
            raise ValueError("reference_quantile has no effect when reference is given; remove one of the two")
        if self.strategy == "map" and any(map(self.is_split, self.ensembles)) and self.scale == "group":
            raise ValueError(
                "strategy map weighs ensembles over all the data, which scale: group does not have; use scale: data"
            )
        if self.strategy == "map" and not self.targets:
            raise ValueError("strategy map needs targets, e.g. targets: {helpful: 1.5}")
        return self

    def objective_names(self, columns: Iterable[str]) -> list[str]:
        """The objectives that selection compares, for a table with these reward columns.

        Raises:
            ValueError: an option names an objective or a reward column that is not there.
        """
        known = list(columns)
        for name, ensemble in self.ensembles.items():
            self._check(f"ensembles.{name}.members", ensemble.members, known, "the rewards")
            if name in known:
                raise ValueError(f"ensembles.{name} has the name of a reward; name the ensemble differently")
        members = {member for ensemble in self.ensembles.values() for member in ensemble.members}
        available = [name for name in known if name not in members] + list(self.ensembles)
        objectives = available if self.objectives is None else list(dict.fromkeys(self.objectives))
        self._check("objectives", objectives, [*known, *self.ensembles], "the objectives")
        judging = [m for name in objectives for m in (self.ensembles[name].members if name in self.ensembles else [name])]
        twice = [name for name in judging if judging.count(name) > 1]
        if twice:
            raise ValueError(
                f"reward {twice[0]!r} judges more than one objective; name it in one ensemble only, or list `objectives`"
            )
        for field in ("margins", "weights", "reference", "targets"):
            self._check(field, getattr(self, field) or (), objectives, "the objectives")
        if self.primary is not None:
            self._check("primary", [self.primary], objectives, "the objectives")
        if self.gap.startswith(PRIMARY):
            self._check("gap", [self.gap.removeprefix(PRIMARY)], objectives, "the objectives")
        if self.reference is not None:
            self._check_complete("reference", self.reference, objectives, "objective")
        if self.min_agreeing is not None and self.min_agreeing > len(objectives):
            raise ValueError(f"min_agreeing is {self.min_agreeing}, but there are {len(objectives)} objectives; lower it")
        columns, judges = self.columns_of(objectives), self.judges_of(objectives)
        self._check("transforms", self.transforms, columns, "the rewards that are selected by")
        if isinstance(self.scale, dict):
            combined = [name for name in self.ensembles if name in judges]
            apart = [name for name in known if name in judges or name not in columns]
            self._check("scale", self.scale, [*apart, *combined], "the rewards")
            self._check_complete("scale", self.scale, judges, "reward")
        return objectives

    def columns_of(self, objectives: Iterable[str]) -> list[str]:
        """The reward columns that judge these objectives, each once."""
        return list(
            dict.fromkeys(
                column for name in objectives for column in (self.ensembles[name].members if name in self.ensembles else [name])
            )
        )

    def judges_of(self, objectives: Iterable[str]) -> list[str]:
        """What is compared: the reward columns, with one name for members that become one value."""
        return [judge for name in objectives for judge in (self.ensembles[name].members if self.is_split(name) else [name])]

    @staticmethod
    def _check(field: str, names: Iterable[str], known: list[str], what: str) -> None:
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"selection.{field} names {unknown[0]!r}, which is not among {what} ({', '.join(known)})")

    @staticmethod
    def _check_complete(field: str, given: Iterable[str], needed: list[str], what: str) -> None:
        absent = [name for name in needed if name not in given]
        if absent:
            raise ValueError(f"selection.{field} lacks {absent[0]!r}; give a number for every {what} or none")
