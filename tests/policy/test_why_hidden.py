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


def make_origin(key: str, layer: LayerName = "project") -> Origin:
    return Origin(layer, f"/{layer}.toml", ("ceiling", key))


def make_ceiling(key: CeilingKey, value: object, layer: LayerName = "project") -> Ceiling:
    if isinstance(value, str):
        value = tuple(parse_selector(text) for text in value.split())
    return Ceiling(key, value, make_origin(key, layer))


def parse_selector(text: str) -> Selector:
    if text.startswith("name:"):
        return Selector("name", text[5:])
    return Selector("position" if text.isdigit() else "uuid", text)


def make_policy(*ceilings: Ceiling, visible: object = None, **settings: object) -> EffectivePolicy:
    if isinstance(visible, str):
        visible = tuple(parse_selector(text) for text in visible.split())
    found = settings | ({} if visible is None else {"visible_devices": visible})
    return EffectivePolicy({key: Setting(value, make_origin(key)) for key, value in found.items()}, ceilings=ceilings)


def find_rules(wanted: EffectivePolicy, grant: Grant = PCI, request: tuple[str, ...] | None = None) -> list[str]:
    """What hides each GPU of the machine. "": it is visible."""
    found = explain_hidden(wanted, grant, MACHINE, request)
    return [found[device.uuid].rule if device.uuid in found else "" for device in MACHINE.devices or ()]


ALLOWED = make_ceiling("allowed_devices", "0 1")


@pytest.mark.parametrize(
    ("wanted", "grant", "expected"),
    [
        (make_policy(visible="0"), PCI, ["", *["visible_devices"] * 4]),
        (
            make_policy(make_ceiling("allowed_devices", "0 1 2", "machine"), visible="1"),
            PCI,
            ["visible_devices", "", "visible_devices", "allowed_devices", "allowed_devices"],
        ),
        (
            make_policy(make_ceiling("allowed_devices", "0 2", "user"), make_ceiling("max_devices", 1)),
            replace(PCI, tokens=("0", "1", "2")),
            ["", "allowed_devices", "max_devices", "grant", "grant"],
        ),
        (make_policy(make_ceiling("require_grant", value=True)), replace(PCI, scheduler=True), ["require_grant"] * 5),
        (make_policy(visible=()), PCI, ["visible_devices"] * 5),
        (make_policy(visible=AutoChoice(1)), PCI, [""] * 5),
        (make_policy(ALLOWED, visible=AutoChoice(1)), PCI, ["", "", *["allowed_devices"] * 3]),
        (make_policy(visible="MIG-31"), PCI, [*["visible_devices"] * 4, ""]),
        (make_policy(), replace(PCI, tokens=("2",)), ["grant", "grant", "", "grant", "grant"]),
        (make_policy(visible="GPU-33"), PCI, [*["visible_devices"] * 3, "", "one_instance"]),
        (make_policy(visible="0 1 2 3"), PCI, ["", "", "", "one_instance", "visible_devices"]),
    ],
)
def test_the_outermost_rule_is_named(wanted: EffectivePolicy, grant: Grant, expected: list[str]) -> None:
    """Of all that hides a GPU the outermost is named: the grant, then ceilings, then the choice, then the count."""
    assert find_rules(wanted, grant) == expected


def test_the_programs_own_request() -> None:
    """A GPU that a program itself left out is hidden by its request, others by the policy."""
    assert find_rules(make_policy(ALLOWED), request=("1",)) == ["request", "", *["allowed_devices"] * 3]


def test_the_origin_is_that_of_the_key() -> None:
    """The key comes with its file."""
    found = explain_hidden(make_policy(make_ceiling("allowed_devices", "0", "machine"), visible="0"), PCI, MACHINE)
    assert found[WHOLE[1].uuid].origin == make_origin("allowed_devices", "machine")
    assert explain_hidden(make_policy(), replace(PCI, tokens=("0",)), MACHINE)[WHOLE[1].uuid].origin is None


def test_unlike_cards_in_cudas_own_order_are_not_guessed() -> None:
    """A granted number among unlike cards, counted the fastest first, hides no GPU that is known."""
    assert find_rules(make_policy(visible="0"), Grant(tokens=("1",))) == [""] * 5


# ---- MIG instances in the plan


@pytest.mark.parametrize(
    ("wanted", "grant", "visible"),
    [
        (make_policy(visible="MIG-31"), PCI, [PARTS[1]]),
        (make_policy(visible="MIG-31 MIG-30"), PCI, [PARTS[1]]),
        (make_policy(visible="name:*A100*"), PCI, [PARTS[0]]),
        (make_policy(visible="name:*"), PCI, list(WHOLE)),
        (make_policy(visible="4"), PCI, [PARTS[1]]),
        (make_policy(make_ceiling("allowed_devices", "3", "machine")), PCI, [PARTS[0]]),
        (make_policy(memory_growth=True), PCI, [PARTS[0]]),
        (make_policy(memory_growth=True), replace(PCI, tokens=("0", "3")), [PARTS[0]]),
        (make_policy(memory_growth=True), replace(PCI, tokens=("GPU-33",)), [PARTS[0]]),
        (make_policy(visible="0"), replace(PCI, tokens=("MIG-31000000-0000",)), [PARTS[1]]),
        (make_policy(visible="0"), replace(PCI, tokens=("0", "GPU-00")), [WHOLE[0]]),
        (make_policy(visible="0"), replace(PCI, tokens=("GPU-0", "GPU-00")), []),
        (make_policy(visible="1"), replace(PCI, tokens=("MIG-31000000-0000", "MIG-30000000-0000")), [PARTS[0]]),
    ],
)
def test_one_instance_is_shown(wanted: EffectivePolicy, grant: Grant, visible: list[Device]) -> None:
    """A token, a glob or a position names instances. A process gets one of them, or whole GPUs."""
    plan = resolve(wanted, grant, MACHINE)
    assert [planned.device for planned in plan.devices or ()] == visible
    if plan.visible is not None and grant.tokens is None:
        assert plan.visible == ",".join(d.uuid if d.instance is not None else str(d.index) for d in visible)


def test_a_share_is_of_the_instance() -> None:
    """A percentage is of the instance's own memory, not of its GPU's."""
    plan = resolve(make_policy(visible="MIG-31", memory_limit=MemoryLimit(fraction=0.5)), PCI, MACHINE)
    (planned,) = plan.devices or ()
    assert planned.limit is not None
    assert planned.device is not None
    assert planned.limit.on(planned.device.total) == 10 * GIB


def test_an_instance_that_was_chosen() -> None:
    """A free instance may be chosen like a GPU, and is then named by its token."""
    wanted = make_policy(visible=AutoChoice(1))
    assert [planned.device for planned in resolve(wanted, PCI, MACHINE).devices or ()] == list(MACHINE.devices or ())
    plan = resolve(wanted, PCI, MACHINE, allocations=(Allocation(PARTS[1].uuid),))
    assert (plan.visible, [planned.device for planned in plan.devices or ()]) == (PARTS[1].uuid, [PARTS[1]])


def test_instances_that_are_left_out_are_noted() -> None:
    """The note about a list of several instances names its file, also without the inventory."""
    wanted = make_policy(visible="MIG-31 MIG-30")
    for inventory in (MACHINE, Inventory()):
        plan = resolve(wanted, PCI, inventory)
        assert [finding.code for finding in plan.findings] == ["one-instance"]
        assert plan.findings[0].path == "/project.toml"
    assert resolve(wanted, PCI, Inventory()).visible == "MIG-31"
