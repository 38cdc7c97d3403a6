"""From a policy to what one process may use, beyond visibility and limits."""

from __future__ import annotations

from tests.policy.values import CARDS, GIB, INVENTORY, make_layer, plan
from tfenv.policy.model import MemoryLimit
from tfenv.values import replace


def test_unlike_cards_in_cudas_own_order_are_not_guessed() -> None:
    """Without a list CUDA counts the fastest first: which card GPU:0 is cannot be told, so no card is named."""
    made = plan(make_layer("project", {"memory_limit": MemoryLimit(bytes=GIB)}))
    assert (made.devices, made.limit, made.pci_order) == (None, MemoryLimit(bytes=GIB), False)
    alike = replace(INVENTORY, devices=CARDS[:2])
    assert [d.device for d in plan(make_layer("project", {"memory_growth": True}), inventory=alike).devices or ()] == [
        *CARDS[:2]
    ]
