"""Simulated GPUs as NVML lists them, without its stub library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tfenv.policy.model import Device, Inventory
from tfenv.simulate.environment import MAX_INSTANCES, SimulatedGpu

_MIB, _HALF_GIB = 1 << 20, 1 << 29
#: Bytes of a GPU's name that an instance's has (machine.c).
_NAME_BYTES = 60


def list_devices(gpus: Sequence[SimulatedGpu]) -> Inventory:
    """Return what `read_inventory` returns in a process on simulated GPUs.

    Args:
        gpus: In the order of their PCI buses. Of one that is split the instances are listed.
    """
    return Inventory(devices=tuple(device for index, gpu in enumerate(gpus) for device in _list_parts(index, gpu)))


def _list_parts(index: int, gpu: SimulatedGpu) -> Iterator[Device]:
    uuid = _make_uuid(index, None)
    if not gpu.instances:
        reserved = _round_to_mib(gpu.reserved)
        yield Device(index, uuid, gpu.name, _round_to_mib(gpu.memory) - reserved, reserved=reserved)
    for number, size in enumerate(gpu.instances):
        total = _round_to_mib(size)
        name = _name_instance(gpu, total)
        yield Device(index, _make_uuid(index, number), name, total, number, uuid, reserved=0)


def _round_to_mib(size: int) -> int:
    return size // _MIB * _MIB


def _name_instance(gpu: SimulatedGpu, size: int) -> str:
    """Name an instance as NVIDIA does, "MIG 3g.20gb": in sevenths of the GPU, with its memory."""
    sevenths = size * MAX_INSTANCES // _round_to_mib(gpu.memory)
    name = gpu.name.encode()[:_NAME_BYTES].decode(errors="replace")
    return f"{name} MIG {sevenths or 1}g.{(size + _HALF_GIB) >> 30}gb"


def _make_uuid(gpu: int, instance: int | None) -> str:
    """Return the UUID that machine.c gives a GPU, or one of its instances."""
    kind, second, number = ("GPU", 0xFA, 0) if instance is None else ("MIG", 0x10 + instance, instance + 1)
    return f"{kind}-{0xA0 + gpu:02x}{second:02x}4e00-0000-4000-8000-00000000{number:02x}{gpu:02x}"
