"""From a policy to what one process may use, where that is not about visibility or limits alone."""

from __future__ import annotations

from tests.policy.values import CARDS, GIB, INVENTORY, layer, plan
from tfenv.policy.model import MemoryLimit
from tfenv.values import replace


def test_unlike_cards_in_cudas_own_order_are_not_guessed() -> None:
    """Without a list CUDA counts the fastest first: which card GPU:0 is cannot be told, so no card is named."""
    made = plan(layer("project", {"memory_limit": MemoryLimit(bytes=GIB)}))
    assert (made.devices, made.limit, made.pci_order) == (None, MemoryLimit(bytes=GIB), False)
    alike = replace(INVENTORY, devices=CARDS[:2])
    assert [d.device for d in plan(layer("project", {"memory_growth": True}), inventory=alike).devices or ()] == [
        *CARDS[:2]
    ]
