"""What is left of a process's memory limit for one of its frameworks. Pure.

`memory_limit` is for a process and a GPU, whatever the frameworks. The first that uses a GPU has all of it, unless
`[gpu.frameworks]` says how they share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from tfenv.errors import Finding
from tfenv.policy.limits import find_tightest, fit_split
from tfenv.policy.model import DeviceOutcome, EffectivePolicy, MemoryLimit, Origin, Plan, PlannedDevice, format_key
from tfenv.policy.units import MIB, format_limit
from tfenv.values import field, frozen, replace

#: What each framework may take of each card by now: framework -> card -> limit.
Promises = Mapping[str, Mapping[str, MemoryLimit]]

#: A fraction below it is what the rounding of sums leaves.
_LEAST_FRACTION = 1e-6
_NOTHING = MemoryLimit(bytes=0)


@frozen
class Claimant:
    """The framework that is about to use GPUs.

    Attributes:
        name: Its top-level package.
        title: Its name in messages.
        yields_to: The framework beside which it goes without a GPU if no file gives it a share. None: none.
    """

    name: str
    title: str
    yields_to: str | None = None


@frozen
class Budget:
    """What a framework gets of a plan beside the other frameworks of its process.

    Attributes:
        plan: The plan, with the limits that are left. A card of which nothing is left is in neither value.
        devices: The cards that CUDA shows, by ordinal. None: they cannot be told apart.
        spent: Nothing is left on any card, so that the framework gets no GPU.
        findings: Who has what is missing.
    """

    plan: Plan
    devices: Mapping[int, PlannedDevice] | None = None
    spent: bool = False
    findings: tuple[Finding, ...] = ()

    def list_limits(self) -> Mapping[str, MemoryLimit]:
        """Return what it may take of each card that is limited."""
        cards = () if self.spent else _list_cards(self.plan, self.devices)
        return {card.identity: card.limit for card in cards if card.limit is not None and not card.limit.unlimited}


def list_promises(devices: Iterable[DeviceOutcome]) -> Mapping[str, MemoryLimit]:
    """Return what an entry point gave of each card that is limited."""
    limits = {device.identity: device.memory_limit for device in devices}
    return {card: limit for card, limit in limits.items() if not limit.unlimited}


@frozen
class _Left:
    """What is left of one card.

    Attributes:
        limit: None: no limit.
        limited_by: The keys that set it.
        holders: The frameworks that have, or are to have, what is missing.
    """

    limit: MemoryLimit | None
    limited_by: tuple[Origin, ...] = ()
    holders: tuple[str, ...] = ()

    @property
    def is_spent(self) -> bool:
        """Whether nothing that a framework could use is left. A size under 1 MiB is nothing to any of them."""
        limit = self.limit
        if limit is None or limit.unlimited:
            return False
        return limit.fraction < _LEAST_FRACTION if limit.fraction is not None else (limit.bytes or 0) < MIB


@frozen
class BudgetBook:
    """What the frameworks of a process were promised.

    Attributes:
        promises: What each may take of each card by now.
        titles: The names of frameworks in messages.
    """

    promises: Promises = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)

    def record(self, claimant: Claimant, limits: Mapping[str, MemoryLimit]) -> BudgetBook:
        """Return a book in which a framework may take this much of these cards, and nothing of others."""
        titles = {**self.titles, claimant.name: claimant.title}
        return BudgetBook({**self.promises, claimant.name: limits}, titles)

    def find_holders(self, claimant: Claimant) -> tuple[str, ...]:
        """Return the other frameworks that were promised memory of any card."""
        return tuple(name for name, limits in self.promises.items() if limits and name != claimant.name)

    # -- what is left

    def fit(
        self,
        plan: Plan,
        devices: Mapping[int, PlannedDevice] | None,
        policy: EffectivePolicy,
        claimant: Claimant,
    ) -> Budget:
        """Return what a framework gets of a plan.

        Args:
            plan: What the process may use.
            devices: The plan's cards by CUDA ordinal. None: they cannot be told apart.
            policy: Says how frameworks share a limit.
            claimant: The framework.
        """
        sharing = _Sharing.read(policy, claimant)
        left = {card.identity: self._subtract(card, sharing) for card in _list_cards(plan, devices)}
        if all(not found.holders for found in left.values()):
            return Budget(_limit_plan(plan, left), _limit_devices(devices, left))
        spent = all(found.is_spent for found in left.values())
        return Budget(
            plan if spent else _limit_plan(plan, left),
            {} if spent and devices is not None else _limit_devices(devices, left),
            spent,
            (self._report(plan, left, claimant, policy, spent=spent),),
        )

    def _subtract(self, card: PlannedDevice, sharing: _Sharing) -> _Left:
        """Return what is left of a card's limit, or of the share, for the framework."""
        limit, own = card.limit, sharing.own
        if limit is None or limit.unlimited:
            return _Left(own, sharing.origins)
        if own is None and (_is_whole(limit, card.total) or _is_wall(card)):
            return _Left(limit, card.limited_by)
        taken = {name: given[card.identity] for name, given in self.promises.items() if card.identity in given}
        taken.pop(sharing.claimant.name, None)
        if own is None:
            taken = {**sharing.others, **taken}
        if sharing.claimant.yields_to is not None and not sharing.origins:
            return _Left(_NOTHING, card.limited_by, (sharing.claimant.yields_to,))
        rest = _measure_rest(limit, tuple(taken.values()), card.total)
        bounds = [limit] if own is None else [limit, own]
        wanted, given = find_tightest(bounds, card.total), find_tightest([rest, *bounds], card.total)
        limited_by = card.limited_by if given == limit else sharing.origins or card.limited_by
        return _Left(given, limited_by, tuple(taken) if taken and given != wanted else ())

    def _report(
        self, plan: Plan, left: Mapping[str, _Left], claimant: Claimant, policy: EffectivePolicy, *, spent: bool
    ) -> Finding:
        holders = tuple(dict.fromkeys(name for found in left.values() for name in found.holders))
        titles = " and ".join(self.titles.get(name, name) for name in holders)
        origin = _find_origin(plan, policy)
        have = f"{'has' if len(holders) == 1 else 'have'} {'all' if spent else 'part'} of the process's memory limit"
        rest = "no GPU" if spent else f"at most {_join_limits(found.limit for found in left.values())}"
        names = (*holders, claimant.name)
        shares = ", ".join(f'{name} = "{_suggest(plan, len(names))}"' for name in names)
        remedy = f"share it by frameworks = {{{shares}}} in [gpu]"
        if "frameworks" in policy.settings:
            remedy = f"leave {claimant.name} a larger share in frameworks"
        return Finding(
            "budget-spent",
            f"{titles} {have}, so {claimant.title} gets {rest}; {remedy}",
            "warning",
            path=origin.path if origin else None,
            key=format_key(origin.key) if origin else None,
        )


@frozen
class _Sharing:
    """What `[gpu.frameworks]` says for one framework.

    Attributes:
        claimant: The framework.
        own: Its share. None: it has none.
        others: The shares of other frameworks.
        origins: The key that says how frameworks share. (): none does.
    """

    claimant: Claimant
    own: MemoryLimit | None
    others: Mapping[str, MemoryLimit]
    origins: tuple[Origin, ...]

    @classmethod
    def read(cls, policy: EffectivePolicy, claimant: Claimant) -> _Sharing:
        setting, shares = policy.settings.get("frameworks"), get_framework_shares(policy)
        others = {name: share for name, share in shares.items() if name != claimant.name}
        return cls(claimant, shares.get(claimant.name), others, () if setting is None else (setting.origin,))


def get_framework_shares(policy: EffectivePolicy) -> Mapping[str, MemoryLimit]:
    """Return what `[gpu.frameworks]` gives to each framework it names."""
    setting = policy.settings.get("frameworks")
    return {} if setting is None else cast("Mapping[str, MemoryLimit]", setting.value)


def apply_framework_share(plan: Plan, policy: EffectivePolicy, name: str) -> Plan:
    """Limit a plan to what `[gpu.frameworks]` gives to a framework. Without a share there the plan stays.

    Args:
        plan: What the process may use.
        policy: Says how frameworks share a limit.
        name: The framework's top-level package.
    """
    if name not in get_framework_shares(policy):
        return plan
    return BudgetBook().fit(plan, None, policy, Claimant(name, name)).plan


# ---- cards


def _list_cards(plan: Plan, devices: Mapping[int, PlannedDevice] | None) -> Sequence[PlannedDevice]:
    if devices is not None:
        return tuple(devices.values())
    # Of cards that nobody can name there is one limit for all.
    return (plan.find_device(0),) if plan.devices is None else plan.devices


def _limit_devices(
    devices: Mapping[int, PlannedDevice] | None, left: Mapping[str, _Left]
) -> Mapping[int, PlannedDevice] | None:
    if devices is None:
        return None
    kept = {ordinal: card for ordinal, card in devices.items() if not left[card.identity].is_spent}
    return {ordinal: _cut(card, left[card.identity]) for ordinal, card in kept.items()}


def _limit_plan(plan: Plan, left: Mapping[str, _Left]) -> Plan:
    if plan.devices is None:
        found = left.get("")
        return plan if found is None else replace(plan, limit=found.limit, limited_by=found.limited_by)
    kept = (card for card in plan.devices if card.identity not in left or not left[card.identity].is_spent)
    return replace(plan, devices=tuple(_cut(card, left.get(card.identity)) for card in kept))


def _cut(card: PlannedDevice, found: _Left | None) -> PlannedDevice:
    """Limit a card to what is left of it. The logical GPUs that it is split into shrink with it."""
    if found is None or found.limit == card.limit:
        return card
    parts = fit_split(card.logical_devices, found.limit, card.total)
    return replace(card, limit=found.limit, limited_by=found.limited_by, logical_devices=parts)


# ---- amounts


def _is_wall(card: PlannedDevice) -> bool:
    """Return whether only the limit of a cgroup holds: no file divides it, and the driver keeps it for all together."""
    wall = None if card.device is None else card.device.wall
    return wall is not None and card.limited_by == (wall.origin,)


def _is_whole(limit: MemoryLimit, total: int | None) -> bool:
    """Return whether a limit leaves all of the card, so that there is nothing to divide."""
    size = limit.on(total)
    if limit.bytes is None:
        return limit.fraction is not None and limit.fraction >= 1
    return total is not None and size is not None and size >= total


def _measure_rest(limit: MemoryLimit, taken: Sequence[MemoryLimit], total: int | None) -> MemoryLimit:
    """Return what is left of a limit. Where sizes and shares do not compare, nothing is."""
    if not taken:
        return limit
    if limit.bytes is None and all(given.bytes is None for given in taken):
        rest = (limit.fraction or 0) - sum(given.fraction or 0 for given in taken)
        return MemoryLimit(fraction=max(rest, 0))
    if total is None and any(amount.fraction is not None for amount in (limit, *taken)):
        return _NOTHING
    return MemoryLimit(bytes=max((limit.on(total) or 0) - sum(given.on(total) or 0 for given in taken), 0))


def _suggest(plan: Plan, count: int) -> str:
    """Return an equal share of the smallest limit, in words that a file can hold."""
    limits = [card.limit for card in plan.devices or ()] or [plan.limit]
    sizes = [limit.bytes for limit in limits if limit is not None and limit.bytes is not None]
    if sizes:
        return f"{min(sizes) // count // MIB}MiB"
    fractions = [limit.fraction for limit in limits if limit is not None and limit.fraction is not None]
    return f"{min(fractions, default=1) / count:.0%}"


def _join_limits(limits: Iterable[MemoryLimit | None]) -> str:
    return ", ".join(dict.fromkeys(format_limit(limit) for limit in limits))


def _find_origin(plan: Plan, policy: EffectivePolicy) -> Origin | None:
    setting = policy.settings.get("frameworks")
    return setting.origin if setting is not None else next(iter(plan.limits), None)
