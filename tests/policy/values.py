"""Builders and strategies of policy values for the tests of the laws."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from hypothesis import strategies as st

from tfenv.policy.merge import merge
from tfenv.policy.model import (
    Allocation,
    AutoChoice,
    Device,
    DeviceRule,
    Grant,
    Inventory,
    Layer,
    LayerName,
    MemoryLimit,
    Origin,
    Plan,
    RankChoice,
    Selector,
    Setting,
    Share,
    Subject,
    Table,
    Tables,
)
from tfenv.policy.resolve import resolve
from tfenv.policy.units import MIB
from tfenv.values import replace

GIB = 1 << 30
PATHS = {
    "machine": "/etc/tfgpu/tfgpu.toml",
    "site": "/opt/site/tfgpu.toml",
    "user": "/home/a/.config/tfgpu/tfgpu.toml",
    "project": "/srv/p/tfgpu.toml",
}
SUBJECT = Subject(user="alice", uid=1000, groups=("students", "vision"), project="/srv/p")

CARDS = tuple(
    Device(index, f"GPU-{index:08x}-0000-4000-8000-000000000000", name, total)
    for index, (name, total) in enumerate(
        [("NVIDIA A100", 40 * GIB), ("NVIDIA A100", 40 * GIB), ("NVIDIA T4", 16 * GIB), ("NVIDIA T4", 16 * GIB)]
    )
)
INVENTORY = Inventory(devices=CARDS)
NO_NVML = Inventory()
NO_GRANT = Grant()


def make_origin(layer: LayerName, *key: str | int) -> Origin:
    return Origin(layer, PATHS.get(layer, "<tfgpu run>"), key)


def make_table(layer: LayerName, section: str, values: dict[str, object]) -> Table:
    return {key: Setting(value, make_origin(layer, section, key)) for key, value in values.items()}


def make_layer(
    name: LayerName,
    gpu: dict[str, object] | None = None,
    ceiling: dict[str, object] | None = None,
    on_error: str | None = None,
) -> Layer:
    """A layer as a file with these tables would give it."""
    return Layer(
        name=name,
        top={} if on_error is None else {"on_error": Setting(on_error, make_origin(name, "on_error"))},
        base=Tables(gpu=make_table(name, "gpu", gpu or {}), ceiling=make_table(name, "ceiling", ceiling or {})),
        paths=(PATHS.get(name, "<tfgpu run>"),),
    )


def pick(*positions: int) -> tuple[Selector, ...]:
    return tuple(Selector("position", str(position)) for position in positions)


def pick_uuid(text: str) -> Selector:
    return Selector("uuid", text)


def pick_name(text: str) -> Selector:
    return Selector("name", text)


def plan(
    *made: Layer,
    grant: Grant = NO_GRANT,
    inventory: Inventory = INVENTORY,
    request: str | None = None,
    allocations: tuple[Allocation, ...] | None = None,
) -> Plan:
    """The plan of these layers on a machine with two A100 and two T4."""
    tokens = None if request is None else tuple(request.split(",")) if request else ()
    return resolve(merge(made, SUBJECT), grant, inventory, tokens, allocations)


def list_codes(made: Plan) -> list[str]:
    return [finding.code for finding in made.findings]


def list_devices(made: Plan) -> list[Device]:
    return [device.device for device in made.devices or () if device.device is not None]


# ---- random cases

#: Every form of FACTS: ordinals, UUIDs and beginnings of them, MIG's two forms, and what CUDA stops at.
MIG = ("MIG-3e6f1c2a-0000-5000-8000-000000000001", "MIG-GPU-00000001-0000-4000-8000-000000000000/1/0")
TOKENS = (
    *map(str, range(6)),
    *(card.uuid for card in CARDS),
    *(card.uuid[:12] for card in CARDS),
    *MIG,
    *("-1", "", " 1", "NoDevFiles", "void", "GPU-", "7" * 30),
)


@dataclass(frozen=True)
class RandomCase:
    """Four layers on a machine."""

    layers: tuple[Layer, ...]
    grant: Grant
    inventory: Inventory
    request: tuple[str, ...] | None


class CaseGenerator(random.Random):
    """Makes random cases. Hypothesis, value by value, takes 20 ms for one, and CI has to try thousands."""

    def keep_some(self, values: dict[str, object]) -> dict[str, object]:
        """Some of the keys."""
        return {key: value for key, value in values.items() if self.random() < 0.4}

    def draw_limit(self, *, bound: bool = False) -> MemoryLimit:
        """A size, a share, or "none" unless it is a `bound`."""
        size = MemoryLimit(bytes=self.choice((1, 1000, 9 << 10, self.randint(1, 64 << 10))) * MIB)
        share = MemoryLimit(fraction=self.choice((1, 50, 100, self.randint(1, 100))) / 100)
        return self.choice((size, share) if bound else (size, share, MemoryLimit()))

    def draw_process_limit(self, *, bound: bool = False) -> MemoryLimit:
        """As above, or "granted"."""
        return MemoryLimit(granted=True) if self.random() < 0.3 else self.draw_limit(bound=bound)

    def draw_share(self) -> Share | None:
        """A part of a GPU, shards of one or several GPUs, or nothing."""
        fraction = self.choice((1.0, 0.5, 1 / 3, self.randint(1, 100) / 100))
        shards = Share("Slurm", "shards", fraction, self.randint(1, 12), self.randint(1, 4))
        return self.choice((None, Share("Ray", f"num_gpus={fraction:g}", fraction), shards))

    def draw_selector(self) -> Selector:
        number = self.randrange(6)
        by_uuid = (pick_uuid(f"GPU-{number:08x}"), pick_uuid(self.choice(MIG)))
        return self.choice((*pick(number), *by_uuid, pick_name(self.choice(("*A100*", "*t4*", "*H2*")))))

    def draw_selectors(self) -> tuple[Selector, ...]:
        return tuple(self.draw_selector() for _ in range(self.randint(1, 4)))

    def draw_choice(self) -> object:
        rank: Literal["auto"] | int = self.choice(("auto", self.randrange(6)))
        chosen = AutoChoice(self.randint(1, 5)), RankChoice(rank)
        return self.choice(("all", (), self.draw_selectors(), self.draw_selectors(), *chosen))

    def draw_rule(self, layer_name: LayerName) -> DeviceRule:
        parts = tuple(self.draw_limit(bound=True) for _ in range(self.randrange(4)))
        limit = self.draw_process_limit() if self.random() < 0.5 else None
        return DeviceRule(self.draw_selector(), make_origin(layer_name, "gpu", "device", 0), limit, parts)

    def draw_gpu(self, layer_name: LayerName) -> dict[str, object]:
        return self.keep_some(
            {
                "visible_devices": self.draw_choice(),
                "memory_growth": self.random() < 0.5,
                "memory_limit": self.draw_process_limit(),
                "device": tuple(self.draw_rule(layer_name) for _ in range(self.randrange(3))),
                "allocator": self.choice(("bfc", "cuda_malloc", "cuda_malloc_async")),
            }
        )

    def draw_ceilings(self) -> dict[str, object]:
        return self.keep_some(
            {
                "allowed_devices": self.draw_selectors(),
                "max_devices": self.randrange(6),
                "memory_limit": self.draw_process_limit(bound=True),
                "memory_total": self.draw_limit(bound=True),
                "require_memory_growth": self.random() < 0.5,
                "require_grant": self.choice((True, False, "always")),
            }
        )

    def draw_layer(self, layer_name: LayerName) -> Layer:
        """Settings, ceilings for everybody, for a group and a user, `on_error`, sinks, and the machine's switches."""
        on_error = self.choice((None, "warn", "cpu", "fail"))
        base = make_layer(layer_name, self.draw_gpu(layer_name), self.draw_ceilings(), on_error)
        logs = ("none", "/var/log/tfgpu/<uid>.jsonl", "~/a.jsonl", "logs/gpu.jsonl")
        stderr = self.choice(("summary", "none", "json"))
        sinks = self.keep_some({"stderr": stderr, "file": self.choice(logs), "syslog": self.choice((True, False))})
        switches: dict[str, object] = {
            "allow_disable": self.choice((True, False)),
            "shards_per_gpu": self.randint(1, 12),
        }
        return replace(
            base,
            users={self.choice(("alice", "bob")): self.draw_tables(layer_name, "user")},
            groups=((self.choice(("students", "staff")), self.draw_tables(layer_name, "group")),),
            audit=(make_table(layer_name, "audit", sinks),),
            machine=make_table(layer_name, "machine", self.keep_some(switches) if layer_name == "machine" else {}),
        )

    def draw_tables(self, layer_name: LayerName, whose: str) -> Tables:
        return Tables(ceiling=make_table(layer_name, whose, self.draw_ceilings() if self.random() < 0.5 else {}))

    def draw_tokens(self) -> tuple[str, ...] | None:
        if self.random() < 0.4:
            return None
        return tuple(self.choice(TOKENS[: self.choice((4, 14, len(TOKENS)))]) for _ in range(self.randrange(5)))

    def draw_grant(self) -> Grant:
        rank = self.choice((None, None, *range(6)))
        grant = Grant(self.draw_tokens(), pci_order=self.random() < 0.5, scheduler=self.random() < 0.5, rank=rank)
        return replace(grant, share=self.draw_share())

    def draw_inventory(self) -> Inventory:
        """The tests' machine, one that NVML cannot show, or one of some of the cards."""
        some = self.sample(CARDS, self.randrange(5))
        other = Inventory(tuple(replace(card, index=index) for index, card in enumerate(some)))
        return self.choice((INVENTORY, NO_NVML, other))

    def draw_case(self) -> RandomCase:
        names: tuple[LayerName, ...] = ("machine", "site", "user", "project")
        layers = tuple(map(self.draw_layer, names))
        return RandomCase(layers, self.draw_grant(), self.draw_inventory(), self.draw_tokens())


cases = st.integers(min_value=0, max_value=2**32).map(lambda seed: CaseGenerator(seed).draw_case())
