"""Runs cases: makes the policy, the grant and the plan of each as for a process, and compares them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from tfenv.errors import Finding
from tfenv.launchers.grant import read_grant
from tfenv.launchers.parent import split_tokens
from tfenv.pipeline import Decision, LoadedPolicy, decide
from tfenv.policy.clamps import FindingCollector
from tfenv.policy.model import Grant, Inventory, MemoryLimit, Origin, PlanInputs, PlannedDevice, format_key
from tfenv.policy.units import format_bytes, format_limit
from tfenv.policy.visibility import decide_visibility
from tfenv.policy_tests.load import PolicyLoader, find_faults
from tfenv.policy_tests.model import (
    Case,
    CaseResult,
    DecidingKey,
    Difference,
    Expectation,
    RunResult,
    Suite,
)
from tfenv.values import frozen, replace

_UNLIMITED = "no limit"
_NO_ALLOCATOR = "none"


def run_suites(suites: Iterable[Suite], choose: Callable[[Case], bool] = lambda _: True) -> RunResult:
    """Run the cases of some files.

    Args:
        suites: The files.
        choose: Tells whether a case is run.
    """
    loader = PolicyLoader()
    results: list[CaseResult] = []
    findings: dict[Finding, None] = {}
    for suite in suites:
        findings |= dict.fromkeys(suite.findings)
        for case in filter(choose, suite.cases):
            loaded = loader.load(suite, case)
            findings |= dict.fromkeys(_place(suite, find_faults(suite, case, loaded)))
            results.append(CaseResult(suite, case, compare_case(suite, case, loaded)))
    return RunResult(tuple(results), tuple(findings))


def decide_case(case: Case, loaded: LoadedPolicy) -> Decision:
    """Return what a process gets that is as a case says, under a policy."""
    return decide(loaded, _read_grant(case), case.inventory, split_tokens(case.request))


def _read_grant(case: Case) -> Grant:
    grant, _ = read_grant(case.environment, case.environment, "")
    return grant if case.share is None else replace(grant, share=case.share)


# ---- what a process gets


@frozen
class _Effect:
    """What a process gets, and why.

    Attributes:
        case: The process.
        loaded: Its policy.
        decision: What follows from it.
        devices: Its GPUs, in CUDA's order. Of a choice: the GPUs to choose from.
        count: How many of them it gets.
    """

    case: Case
    loaded: LoadedPolicy
    decision: Decision
    devices: tuple[PlannedDevice, ...]
    count: int

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, with their places. Of a process that is refused, the reasons."""
        if self.decision.refused:
            return self.decision.errors
        return tuple(self.loaded.locate(finding) for finding in (*self.loaded.findings, *self.decision.plan.findings))


def _find_effect(case: Case, loaded: LoadedPolicy) -> _Effect:
    decision = decide_case(case, loaded)
    devices = () if decision.refused else _list_devices(decision, case.inventory)
    choosing = decision.plan.choosing
    count = len(devices) if choosing is None else min(choosing.count, len(devices))
    return _Effect(case, loaded, decision, devices, count)


def _list_devices(decision: Decision, inventory: Inventory) -> tuple[PlannedDevice, ...]:
    plan = decision.plan
    if inventory.no_driver:
        return ()
    if plan.devices is not None:
        return plan.devices
    # All that CUDA shows, whatever they are. One limit is for all of them.
    shown = (plan.find_device(number) for number in range(len(inventory.devices or ())))
    return tuple(
        replace(planned, token=str(device.index), device=device)
        for planned, device in zip(shown, inventory.devices or (), strict=True)
    )


# ---- comparing


def compare_case(suite: Suite, case: Case, loaded: LoadedPolicy) -> tuple[Difference, ...]:
    """Return what a process gets otherwise than a case expects.

    Args:
        suite: The file of the case.
        case: The case.
        loaded: The policy of the process.
    """
    return tuple(_compare(suite, case, loaded))


def _compare(suite: Suite, case: Case, loaded: LoadedPolicy) -> Iterator[Difference]:
    effect, expect = _find_effect(case, loaded), case.expect
    yield from _compare_gpus(suite, effect, expect, "")
    if expect.refused is not None and expect.refused != effect.decision.refused:
        words = {True: "refused", False: "not refused"}
        got, wanted = words[effect.decision.refused], words[expect.refused]
        yield Difference("refused", wanted, got, findings=_place(suite, effect.decision.errors))
    if expect.findings is not None:
        yield from _compare_findings(suite, effect, expect.findings)
    if expect.observed is not None:
        observed = loaded if loaded.observed is None else replace(loaded, policy=loaded.observed.policy)
        yield from _compare_gpus(suite, _find_effect(case, observed), expect.observed, "observed.")


def _compare_gpus(suite: Suite, effect: _Effect, expect: Expectation, prefix: str) -> Iterator[Difference]:
    if expect.devices is not None and not _has_devices(effect, expect.devices):
        origins = _find_narrowings(effect)
        findings = () if effect.devices and not effect.decision.refused else effect.findings
        expected = _format_expected_devices(expect.devices)
        yield _differ(suite, effect, f"{prefix}devices", expected, _format_devices(effect), origins, findings)
    for key, wanted in (("memory_limit", expect.memory_limit), ("memory_total", expect.memory_total)):
        if wanted is not None:
            yield from _compare_limits(suite, effect, wanted, key, prefix)
    plan = effect.decision.plan
    if expect.memory_growth is not None and expect.memory_growth != (plan.growth is True):
        words = {True: "true", False: "false (the program decides)"}
        origins = [plan.grown_by] if plan.grown_by is not None else []
        got = words[plan.growth is True]
        yield _differ(suite, effect, f"{prefix}memory_growth", words[expect.memory_growth], got, origins)
    if expect.allocator is not None and expect.allocator != (plan.allocator or _NO_ALLOCATOR):
        got = plan.allocator or _NO_ALLOCATOR
        yield _differ(suite, effect, f"{prefix}allocator", expect.allocator, got, plan.allocated_by)


def _has_devices(effect: _Effect, wanted: int | tuple[int | str, ...]) -> bool:
    if isinstance(wanted, int):
        return effect.count == wanted
    if effect.decision.plan.choosing is not None and effect.count != len(effect.devices):
        return False  # which of them it gets is not decided
    return len(wanted) == len(effect.devices) and all(map(_is_device, wanted, effect.devices))


def _is_device(wanted: int | str, planned: PlannedDevice) -> bool:
    device, text = planned.device, str(wanted)
    if text.startswith(("GPU-", "MIG-")):
        names = [planned.token] if device is None else [planned.token, device.uuid]
        return any(name.lower().startswith(text.lower()) for name in names)
    return text == (planned.token if device is None else device.label)


def _compare_limits(
    suite: Suite, effect: _Effect, wanted: Sequence[MemoryLimit], key: str, prefix: str
) -> Iterator[Difference]:
    limits = [planned.limit if key == "memory_limit" else planned.user_total for planned in effect.devices]
    each = list(wanted) * len(limits) if len(wanted) == 1 else list(wanted)
    totals = [planned.total for planned in effect.devices]
    if limits and len(each) == len(limits) and all(map(_is_same_limit, each, limits, totals)):
        return
    origins: Iterable[Origin]
    if key == "memory_limit":
        origins = dict.fromkeys(origin for planned in effect.devices for origin in planned.limited_by)
    else:
        origins = [ceiling.origin for ceiling in effect.loaded.policy.list_ceilings("memory_total")]
    exact = _look_alike(each, limits, totals)
    expected = ", ".join(_format_limit(limit, None, exact=exact) for limit in wanted)
    findings = () if effect.devices else effect.findings
    got = _format_limits(effect, limits, exact=exact)
    yield _differ(suite, effect, prefix + key, expected, got, origins, findings)


def _is_same_limit(wanted: MemoryLimit, got: MemoryLimit | None, total: int | None) -> bool:
    got = got or MemoryLimit()
    if total is None or wanted.unlimited or got.unlimited:
        return wanted == got
    return wanted.on(total) == got.on(total)


def _look_alike(wanted: Sequence[MemoryLimit], got: Sequence[MemoryLimit | None], totals: Sequence[int | None]) -> bool:
    """Return whether two different sizes look the same when they are rounded for people."""
    pairs = [(one.on(total), other.on(total)) for one, other, total in zip(wanted, got, totals, strict=False) if other]
    return any(
        one != other and format_bytes(one) == format_bytes(other)
        for one, other in pairs
        if one is not None and other is not None
    )


def _compare_findings(suite: Suite, effect: _Effect, wanted: frozenset[str]) -> Iterator[Difference]:
    findings = (*effect.loaded.findings, *effect.decision.plan.findings)
    got = {finding.code for finding in findings}
    if got == wanted:
        return
    odd = [effect.loaded.locate(finding) for finding in findings if finding.code not in wanted]
    yield Difference("findings", _join_codes(wanted), _join_codes(got), findings=_place(suite, odd))


def _join_codes(codes: Iterable[str]) -> str:
    return ", ".join(sorted(codes)) or "none"


# ---- in words


def _format_expected_devices(devices: int | tuple[int | str, ...]) -> str:
    if isinstance(devices, int):
        return _count_gpus(devices)
    return ", ".join(map(str, devices)) or "no GPU"


def _count_gpus(count: int) -> str:
    return "no GPU" if count == 0 else f"{count} GPU{'' if count == 1 else 's'}"


def _format_devices(effect: _Effect) -> str:
    if effect.decision.refused:
        return "refused"
    names = ", ".join(_name_device(planned) for planned in effect.devices)
    if effect.decision.plan.choosing is not None:
        return f"{effect.count} of {names}" if names else "no GPU"
    return names or "no GPU"


def _name_device(planned: PlannedDevice) -> str:
    return planned.token if planned.device is None else planned.device.label


def _format_limits(effect: _Effect, limits: Sequence[MemoryLimit | None], *, exact: bool) -> str:
    totals = [planned.total for planned in effect.devices]
    texts = [_format_limit(limit, total, exact=exact) for limit, total in zip(limits, totals, strict=True)]
    if not texts:
        return _format_devices(effect)
    if len(set(texts)) == 1:
        return texts[0]
    names = map(_name_device, effect.devices)
    return ", ".join(f"{name}: {text}" for name, text in zip(names, texts, strict=True))


def _format_limit(limit: MemoryLimit | None, total: int | None, *, exact: bool) -> str:
    if limit is None or limit.unlimited:
        return _UNLIMITED
    size = limit.on(total)
    share = None if limit.fraction is None else f"{limit.fraction * 100:g}%"
    if size is None or (total is None and share is not None):
        return format_limit(limit)
    text = f"{size} bytes" if exact else format_bytes(size)
    return text if share is None else f"{text} ({share})"


# ---- why


def _find_narrowings(effect: _Effect) -> Sequence[Origin]:
    """Return the keys that decided which GPUs are left."""
    policy, case = effect.loaded.policy, effect.case
    inputs = PlanInputs(policy, _read_grant(case), case.inventory, split_tokens(case.request))
    origins = list(decide_visibility(inputs, FindingCollector()).narrowed_by)
    choice = policy.settings.get("visible_devices")
    if choice is not None and choice.origin not in origins and effect.decision.plan.choosing is not None:
        origins.append(choice.origin)
    return origins


def _differ(
    suite: Suite,
    effect: _Effect,
    key: str,
    expected: str,
    got: str,
    origins: Iterable[Origin],
    findings: Iterable[Finding] = (),
) -> Difference:
    deciding = tuple(_locate(suite, effect.loaded, origin) for origin in origins)
    return Difference(key, expected, got, deciding, _place(suite, findings))


def _locate(suite: Suite, loaded: LoadedPolicy, origin: Origin) -> DecidingKey:
    value, position = loaded.find_value(origin)
    line, column = position or (None, None)
    return DecidingKey(_find_path(suite, origin.path), format_key(origin.key), value, line, column)


def _place(suite: Suite, findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(replace(f, path=_find_path(suite, f.path)) if f.path is not None else f for f in findings)


def _find_path(suite: Suite, path: str) -> str:
    """Return where a value stands: tables of a case stand in the file of tests."""
    return suite.path if path.startswith("<") else path


def describe_result(result: CaseResult) -> Mapping[str, Any]:
    """Return the result of a case as JSON has it."""
    from tfenv.values import as_dict

    return {
        "name": result.case.name,
        "file": result.suite.path,
        "line": result.line,
        "status": result.status,
        "differences": cast("list[object]", as_dict(result.differences)),
    }
