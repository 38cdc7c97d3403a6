"""Builders and strategies of policy values for the tests of the laws."""

from __future__ import annotations

from hypothesis import strategies as st

from tfenv.policy.model import (
    Ceiling,
    Device,
    Grant,
    Inventory,
    Layer,
    LayerName,
    MemoryLimit,
    Origin,
    Selector,
    Setting,
    Subject,
    Table,
    Tables,
)
from tfenv.policy.units import MIB

GIB = 1 << 30
PATHS = {"machine": "/etc/tfgpu/tfgpu.toml", "user": "/home/a/.config/tfgpu/tfgpu.toml", "project": "/srv/p/tfgpu.toml"}
SUBJECT = Subject(user="alice", uid=1000, groups=("students", "vision"), project="/srv/p")

CARDS = tuple(
    Device(index, f"GPU-{index:08x}-0000-4000-8000-000000000000", name, total)
    for index, (name, total) in enumerate(
        [("NVIDIA A100", 40 * GIB), ("NVIDIA A100", 40 * GIB), ("NVIDIA T4", 16 * GIB), ("NVIDIA T4", 16 * GIB)]
    )
)
INVENTORY = Inventory(devices=CARDS)


def origin(layer: LayerName, *key: str | int) -> Origin:
    return Origin(layer, PATHS.get(layer, "<tfgpu run>"), key)


def table(layer: LayerName, section: str, values: dict[str, object]) -> Table:
    return {key: Setting(value, origin(layer, section, key)) for key, value in values.items()}


def layer(
    name: LayerName,
    gpu: dict[str, object] | None = None,
    ceiling: dict[str, object] | None = None,
    on_error: str | None = None,
) -> Layer:
    """A layer as a file with these tables would give it."""
    return Layer(
        name=name,
        top={} if on_error is None else {"on_error": Setting(on_error, origin(name, "on_error"))},
        base=Tables(gpu=table(name, "gpu", gpu or {}), ceiling=table(name, "ceiling", ceiling or {})),
        paths=(PATHS.get(name, "<tfgpu run>"),),
    )


def at(*positions: int) -> tuple[Selector, ...]:
    return tuple(Selector("position", str(position)) for position in positions)


def uuid(text: str) -> Selector:
    return Selector("uuid", text)


def name(text: str) -> Selector:
    return Selector("name", text)


def ceilings_of(made: Layer) -> list[Ceiling]:
    return [Ceiling(key, setting.value, setting.origin) for key, setting in made.base.ceiling.items()]  # type: ignore[arg-type]


# ---- strategies

limits = st.one_of(
    st.integers(min_value=1, max_value=64 * 1024).map(lambda mib: MemoryLimit(bytes=mib * MIB)),
    st.integers(min_value=1, max_value=100).map(lambda percent: MemoryLimit(fraction=percent / 100)),
    st.just(MemoryLimit()),
)
selectors = st.one_of(
    st.integers(min_value=0, max_value=5).map(lambda position: Selector("position", str(position))),
    st.integers(min_value=0, max_value=5).map(lambda index: Selector("uuid", f"GPU-{index:08x}")),
    st.sampled_from(["*A100*", "*t4*", "*H200*"]).map(lambda text: Selector("name", text)),
)
lists = st.lists(selectors, min_size=1, max_size=4).map(tuple)
choices = st.one_of(st.just("all"), st.just(()), lists)

gpu_tables = st.fixed_dictionaries(
    {},
    optional={
        "visible_devices": choices,
        "memory_growth": st.booleans(),
        "memory_limit": limits,
        "allocator": st.sampled_from(["bfc", "cuda_malloc", "cuda_malloc_async"]),
    },
)
ceiling_tables = st.fixed_dictionaries(
    {},
    optional={
        "allowed_devices": lists,
        "max_devices": st.integers(min_value=0, max_value=5),
        "memory_limit": limits.filter(lambda limit: not limit.unlimited),
        "require_memory_growth": st.booleans(),
        "require_grant": st.booleans(),
    },
)


def layers(layer_name: LayerName) -> st.SearchStrategy[Layer]:
    return st.builds(
        layer,
        st.just(layer_name),
        gpu_tables,
        ceiling_tables,
        st.one_of(st.none(), st.sampled_from(["warn", "cpu", "fail"])),
    )


tokens = st.one_of(st.integers(min_value=0, max_value=3).map(str), st.sampled_from([d.uuid for d in CARDS]))
token_lists = st.one_of(st.none(), st.lists(tokens, max_size=4, unique=True).map(tuple))
grants = st.builds(Grant, token_lists, pci_order=st.booleans(), scheduler=st.booleans())
