"""Which card of a Plan is which of those that CUDA shows."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.policy.values import CARDS, GIB, INVENTORY, make_layer, make_origin, pick_name, plan
from tfenv.policy.model import DeviceRule, Grant, MemoryLimit, Plan
from tfenv.policy.placement import Placement, place
from tfenv.values import replace

#: CUDA's UUIDs of the second A100 and the first T4, in its own order.
SHOWN = [CARDS[2], CARDS[1]]
DIGITS = [card.uuid.partition("-")[2].replace("-", "") for card in SHOWN]
BY_NAME = make_layer(
    "project",
    {"device": (DeviceRule(pick_name("*T4*"), make_origin("project", "gpu", "device", 0), MemoryLimit(bytes=GIB)),)},
)


def place_all(grant: Grant, uuids: list[str] | None = DIGITS) -> tuple[Placement, list[Mapping[str, str]]]:
    """Return where a process with this grant has its GPUs, and for which tokens the Plan was made anew."""
    asked: list[Mapping[str, str]] = []

    def replan(named: Mapping[str, str]) -> Plan:
        asked.append(named)
        return plan(BY_NAME, grant=grant, inventory=replace(INVENTORY, named=named))

    return place(plan(BY_NAME, grant=grant), [0, 1], uuids, replan, "TensorFlow"), asked


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        (("3", "1"), [{"3": SHOWN[0].uuid, "1": SHOWN[1].uuid}]),
        ((SHOWN[0].uuid, SHOWN[1].uuid), []),
        ((SHOWN[0].uuid[:12], SHOWN[1].uuid), []),
    ],
    ids=["numbers", "UUIDs", "a beginning"],
)
def test_cuda_tells_which_card_a_number_is(tokens: tuple[str, ...], named: list[Mapping[str, str]]) -> None:
    """On unlike cards in CUDA's own order a number says nothing until then. The limits follow the cards."""
    placement, asked = place_all(Grant(tokens))
    assert asked == named
    assert placement.remark is None
    devices = placement.devices or {}
    assert [devices[ordinal].device for ordinal in (0, 1)] == SHOWN
    assert [devices[ordinal].limit for ordinal in (0, 1)] == [MemoryLimit(bytes=GIB), None]


@pytest.mark.parametrize("uuids", [None, DIGITS[:1]], ids=["not told", "fewer than TensorFlow lists"])
def test_without_uuids_cards_are_taken_in_their_order(uuids: list[str] | None) -> None:
    """Nothing is guessed, and the Plan stays as it is."""
    placement, asked = place_all(Grant(("3", "1")), uuids)
    assert (placement, asked) == (Placement(None), [])


def test_a_card_the_policy_does_not_know_is_left_out() -> None:
    """A third GPU, opened by somebody else before, is not allowed, and the remark says how many are."""
    other = CARDS[0].uuid.partition("-")[2].replace("-", "")
    made = plan(BY_NAME, grant=Grant((SHOWN[0].uuid, SHOWN[1].uuid)))
    placement = place(made, [0, 1, 2], [other, *DIGITS], lambda _: made, "TensorFlow")
    assert {ordinal: device.device for ordinal, device in (placement.devices or {}).items()} == {
        1: SHOWN[0],
        2: SHOWN[1],
    }
    assert placement.remark is not None
    assert placement.remark.code == "too-late"
