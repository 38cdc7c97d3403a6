"""What hides a GPU from a process, and MIG instances among GPUs. Pure."""

from __future__ import annotations

import pytest

from tfenv.policy.model import (
    Allocation,
    AutoChoice,
    Ceiling,
    CeilingKey,
    Device,
    EffectivePolicy,
    Grant,
    Inventory,
    LayerName,
    MemoryLimit,
    Origin,
    Selector,
    Setting,
)
from tfenv.policy.resolve import resolve
from tfenv.policy.why_hidden import explain_hidden
from tfenv.values import replace

GIB = 1 << 30
WHOLE = tuple(Device(i, f"GPU-{i}{i}000000-0000", "NVIDIA A10", 24 * GIB) for i in range(3))
PARTS = tuple(Device(3, f"MIG-3{i}000000-0000", "NVIDIA A100 MIG 3g.20gb", 20 * GIB, i, "GPU-33-0") for i in range(2))
MACHINE = Inventory((*WHOLE, *PARTS))
PCI = Grant(pci_order=True)


def origin(key: str, layer: LayerName = "project") -> Origin:
    return Origin(layer, f"/{layer}.toml", ("ceiling", key))


def ceiling(key: CeilingKey, value: object, layer: LayerName = "project") -> Ceiling:
    if isinstance(value, str):
        value = tuple(selector(text) for text in value.split())
    return Ceiling(key, value, origin(key, layer))


def selector(text: str) -> Selector:
    if text.startswith("name:"):
        return Selector("name", text[5:])
    return Selector("position" if text.isdigit() else "uuid", text)


def policy(*ceilings: Ceiling, visible: object = None, **settings: object) -> EffectivePolicy:
    if isinstance(visible, str):
        visible = tuple(selector(text) for text in visible.split())
    found = settings | ({} if visible is None else {"visible_devices": visible})
    return EffectivePolicy({key: Setting(value, origin(key)) for key, value in found.items()}, ceilings=ceilings)


def rules(wanted: EffectivePolicy, grant: Grant = PCI, request: tuple[str, ...] | None = None) -> list[str]:
    """For each GPU of the machine what hides it; "" for a visible one."""
    found = explain_hidden(wanted, grant, MACHINE, request)
    return [found[device.uuid].rule if device.uuid in found else "" for device in MACHINE.devices or ()]


@pytest.mark.parametrize(
    ("wanted", "grant", "expected"),
    [
        (policy(visible="0"), PCI, ["", *["visible_devices"] * 4]),
        (
            policy(ceiling("allowed_devices", "0 1 2", "machine"), visible="1"),
            PCI,
            ["visible_devices", "", "visible_devices", "allowed_devices", "allowed_devices"],
        ),
        (
            policy(ceiling("allowed_devices", "0 2", "user"), ceiling("max_devices", 1)),
            replace(PCI, tokens=("0", "1", "2")),
            ["", "allowed_devices", "max_devices", "grant", "grant"],
        ),
        (policy(ceiling("require_grant", value=True)), replace(PCI, scheduler=True), ["require_grant"] * 5),
        (policy(visible=()), PCI, ["visible_devices"] * 5),
        (policy(visible=AutoChoice(1)), PCI, [""] * 5),
        (policy(ceiling("allowed_devices", "0 1"), visible=AutoChoice(1)), PCI, ["", "", *["allowed_devices"] * 3]),
        (policy(visible="MIG-31"), PCI, [*["visible_devices"] * 4, ""]),
        (policy(), replace(PCI, tokens=("2",)), ["grant", "grant", "", "grant", "grant"]),
        (policy(visible="GPU-33"), PCI, [*["visible_devices"] * 3, "", "one_instance"]),
        (policy(visible="0 1 2 3"), PCI, ["", "", "", "one_instance", "visible_devices"]),
    ],
)
def test_the_outermost_rule_is_told(wanted: EffectivePolicy, grant: Grant, expected: list[str]) -> None:
    """Of all that hides a GPU the outermost is named: the grant, then ceilings, then the choice, then the count."""
    assert rules(wanted, grant) == expected


def test_the_programs_own_wish() -> None:
    """What a program itself left out is told as its own wish, beside what the policy hides."""
    assert rules(policy(ceiling("allowed_devices", "0 1")), request=("1",)) == ["request", "", *["allowed_devices"] * 3]


def test_the_origin_is_that_of_the_key() -> None:
    """The key comes with the file it stands in."""
    found = explain_hidden(policy(ceiling("allowed_devices", "0", "machine"), visible="0"), PCI, MACHINE)
    assert found[WHOLE[1].uuid].origin == origin("allowed_devices", "machine")
    assert explain_hidden(policy(), replace(PCI, tokens=("0",)), MACHINE)[WHOLE[1].uuid].origin is None


def test_what_cannot_be_told_is_not_told() -> None:
    """A granted number among unlike cards, counted the fastest first, hides nothing that we know of."""
    assert rules(policy(visible="0"), Grant(tokens=("1",))) == [""] * 5


# ---- MIG instances in the plan


@pytest.mark.parametrize(
    ("wanted", "grant", "visible"),
    [
        (policy(visible="MIG-31"), PCI, [PARTS[1]]),
        (policy(visible="MIG-31 MIG-30"), PCI, [PARTS[1]]),
        (policy(visible="name:*A100*"), PCI, [PARTS[0]]),
        (policy(visible="name:*"), PCI, list(WHOLE)),
        (policy(visible="4"), PCI, [PARTS[1]]),
        (policy(ceiling("allowed_devices", "3", "machine")), PCI, [PARTS[0]]),
        (policy(memory_growth=True), PCI, [PARTS[0]]),
        (policy(memory_growth=True), replace(PCI, tokens=("0", "3")), [PARTS[0]]),
        (policy(memory_growth=True), replace(PCI, tokens=("GPU-33",)), [PARTS[0]]),
        (policy(visible="0"), replace(PCI, tokens=("MIG-31000000-0000",)), [PARTS[1]]),
        (policy(visible="0"), replace(PCI, tokens=("0", "GPU-00")), []),
        (policy(visible="1"), replace(PCI, tokens=("MIG-31000000-0000", "MIG-30000000-0000")), [PARTS[0]]),
    ],
)
def test_one_instance_is_shown(wanted: EffectivePolicy, grant: Grant, visible: list[Device]) -> None:
    """Instances are named by token, by glob and by position; a process gets one of them, or whole GPUs."""
    plan = resolve(wanted, grant, MACHINE)
    assert [planned.device for planned in plan.devices or ()] == visible
    if plan.visible is not None and grant.tokens is None:
        assert plan.visible == ",".join(d.uuid if d.instance is not None else str(d.index) for d in visible)


def test_a_share_is_of_the_instance() -> None:
    """A percentage is of the instance's own memory, not of its GPU's."""
    plan = resolve(policy(visible="MIG-31", memory_limit=MemoryLimit(fraction=0.5)), PCI, MACHINE)
    (planned,) = plan.devices or ()
    assert planned.limit is not None
    assert planned.device is not None
    assert planned.limit.on(planned.device.total) == 10 * GIB


def test_an_instance_that_was_chosen() -> None:
    """A free instance may be chosen like a GPU, and is then named by its token."""
    wanted = policy(visible=AutoChoice(1))
    assert [planned.device for planned in resolve(wanted, PCI, MACHINE).devices or ()] == list(MACHINE.devices or ())
    plan = resolve(wanted, PCI, MACHINE, allocations=(Allocation(PARTS[1].uuid),))
    assert (plan.visible, [planned.device for planned in plan.devices or ()]) == (PARTS[1].uuid, [PARTS[1]])


def test_what_is_left_out_is_said() -> None:
    """A list of several instances is noted where it was written; without the inventory, too."""
    wanted = policy(visible="MIG-31 MIG-30")
    for inventory in (MACHINE, Inventory()):
        plan = resolve(wanted, PCI, inventory)
        assert [finding.code for finding in plan.findings] == ["one-instance"]
        assert plan.findings[0].path == "/project.toml"
    assert resolve(wanted, PCI, Inventory()).visible == "MIG-31"
