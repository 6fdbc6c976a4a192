"""The policies that candidates come from, which of them share an engine, and which candidates each gives.

Invariant: a policy's candidates follow those of the engines before its own, so engines that fill a group one after the other each
append to it. The order is by name, not as in the file, so that equal fingerprints mean equal candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rc_ray.config import Config, GenerationConfig
from rc_ray.config.rewards import NamedModel
from rc_ray.core.shares import candidate_ranges, share_offset

ONLY = "policy"
"""Name of a policy that has none of its own."""


@dataclass(frozen=True)
class Member:
    """One policy: a model, perhaps with a LoRA adapter, and its weight."""

    name: str
    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    weight: float = 1.0

    @property
    def base(self) -> tuple[str, str | None, bool]:
        """What an engine loads; policies in which it is equal share one."""
        return self.model, self.revision, self.trust_remote_code

    def described(self) -> str:
        """The model with what is put on it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.model}{revision}" + (f" + adapter {self.adapter}" if self.adapter else "")


def members_of(config: Config) -> tuple[Member, ...]:
    """The policies of a configuration, those of one engine side by side."""
    own = (config.model, config.revision, config.trust_remote_code)
    if not config.generation.policies:
        return (Member(ONLY, *own, config.generation.adapter),)
    found = [
        Member(name, *((p.model, p.revision, p.trust_remote_code) if p.model else own), p.adapter, p.weight)
        for name, p in config.generation.policies.items()
    ]
    first: dict[Any, str] = {}
    for member in sorted(found, key=lambda m: m.name):
        first.setdefault(member.base, member.name)
    return tuple(sorted(found, key=lambda m: (first[m.base], m.name)))


def engines_of(members: tuple[Member, ...]) -> list[tuple[Member, ...]]:
    """The policies that each engine samples, in their order."""
    engines: dict[Any, tuple[Member, ...]] = {}
    for member in members:
        engines[member.base] = (*engines.get(member.base, ()), member)
    return list(engines.values())


def model_names(config: Config, rewards: Iterable[str] | None = None) -> dict[str, NamedModel]:
    """Everything that a configuration loads, by its key in the manifest: name, revision, whether it is an adapter.

    Args:
        rewards: the objectives that count; None: all.
    """
    members, reference = members_of(config), config.training.reference
    named: list[NamedModel] = [(config.model, config.revision, False)]
    named += [(member.model, member.revision, False) for member in members]
    named += [(member.adapter, None, True) for member in members if member.adapter is not None]
    if config.training.enabled and reference.model is not None:
        named.append((reference.model, reference.revision, False))
    for name in config.rewards if rewards is None else rewards:
        named += config.rewards[name].models().values()
    return {model[0] if model[1] is None else f"{model[0]}@{model[1]}": model for model in named}


def with_commits(config: Config, commits: Mapping[str, str]) -> Config:
    """The configuration with these commits of Hub models, by name, as the revisions that it does not give."""

    def pinned(section: Any, fields: Mapping[str, str]) -> Any:
        """The section with commits in the fields of revisions, given with those of the names."""
        update = {
            revision: commits[getattr(section, name)]
            for revision, name in fields.items()
            if getattr(section, revision) is None and getattr(section, name) in commits
        }
        return section.model_copy(update=update)

    own = {"revision": "model"}
    generation, training = config.generation, config.training
    policies = {name: pinned(policy, own) for name, policy in generation.policies.items()}
    rewards = {
        name: pinned(reward, {"revision" if field == "model" else f"{field}_revision": field for field in reward.models()})
        for name, reward in config.rewards.items()
    }
    update = {
        "rewards": rewards,
        "generation": generation.model_copy(update={"policies": policies}),
        "training": training.model_copy(update={"reference": pinned(training.reference, own)}),
    }
    whole: Config = pinned(config, own)
    return whole.model_copy(update=update)


def lines(config: Config) -> list[str]:
    """Each policy with its share, for `rc-ray plan`."""
    members = members_of(config)
    whole = sum(m.weight for m in members)
    return [f"{m.name}  {m.weight / whole:.1%} of the candidates, weight {m.weight:g}: {m.described()}" for m in members]


@dataclass(frozen=True)
class Policy:
    """What candidates are sampled from, and how: one policy or a mixture of several."""

    members: tuple[Member, ...]
    generation: GenerationConfig
    num_candidates: int
    max_candidates: int | None
    seed: int

    @property
    def is_named(self) -> bool:
        """Whether the policies are those of `generation.policies`, rather than the only one or another model."""
        return self.members[0].name in self.generation.policies

    def shares(self, prompt_id: str, number: int) -> Iterator[tuple[Member, int, int]]:
        """Each policy with the candidates [first, end) that it gives, of `number`."""
        ranges = candidate_ranges([m.weight for m in self.members], number, share_offset(self.seed, prompt_id))
        for member, (first, end) in zip(self.members, ranges, strict=True):
            yield member, first, end


def policy_of(
    config: Config, model: str | None = None, num_candidates: int | None = None, adapter: str | None = None
) -> Policy:
    """The policy that a configuration samples training candidates from; given a number of candidates, the one that it trains and
    evaluates, perhaps with an adapter, or another model, sampled in the same way."""
    if model is None and num_candidates is None:
        members = members_of(config)
    else:
        members = (Member(ONLY, model or config.model, None if model else config.revision, config.trust_remote_code, adapter),)
    return Policy(
        members=members,
        generation=config.generation,
        num_candidates=num_candidates or config.generation.num_candidates,
        max_candidates=None if num_candidates else config.generation.max_candidates,
        seed=config.seed,
    )
