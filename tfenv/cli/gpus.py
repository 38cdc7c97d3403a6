"""`tfgpu gpus`: every GPU of the machine, how full and busy it is, and whether the policy lets a program see it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tfenv.cli.output import FINDINGS, OK, shown_path
from tfenv.cli.refresh import Cell, Column, add_options, block, is_wide, show
from tfenv.devices.inventory import read_inventory
from tfenv.devices.usage import GpuState, GpuUsage, read_usage
from tfenv.launchers.grant import read_current_grant
from tfenv.pipeline import Decision, LoadedPolicy, check_disable_switch, current_start, decide, load
from tfenv.policy.model import EffectivePolicy, Grant, Inventory, Origin
from tfenv.policy.units import format_bytes
from tfenv.policy.why_hidden import HiddenReason, explain_hidden
from tfenv.values import field, frozen, replace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tfenv.cli.output import SubParsers

__all__ = ["add_parser", "run"]

_COLUMNS = (
    Column("GPU"), Column("name"), Column("UUID"), Column("memory used", number=True), Column("busy", number=True),
    Column("TensorFlow"),
)  # fmt: skip
_SHORT_UUID = len("GPU-12345678")
_FULL = 0.9


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "gpus",
        help="list the GPUs, how full they are, and which of them the policy shows",
        description="List every GPU of the machine with its MIG instances, how full and how busy it is, the name "
        "TensorFlow gives it in a program that starts here, and for the others what hides them. "
        "Exit codes: 0 ok, 1 the driver cannot be asked.",
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Show the GPUs; 1 when NVML cannot be asked."""
    return FINDINGS if show(_look, args).usage.problem else OK


# ---- looking


@frozen
class _Sight:
    """The GPUs at one moment.

    Attributes:
        usage: What NVML says.
        names: Of the visible ones, by UUID: TensorFlow's name; "yes" where the order is not known, "?" where it
            cannot be told whether it is visible, "may be chosen" where `{count = …}` will choose.
        hidden: Why the others are not, by UUID: the rule, and the whole reason in words.
        notes: What is to be said of all.
    """

    usage: GpuUsage
    names: Mapping[str, str] = field(default_factory=dict)
    hidden: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[tuple[str, str], ...] = ()

    def text(self) -> RenderableType:
        return block(_COLUMNS, (self._row(gpu) for gpu in self.usage.gpus), self._below())

    def as_dict(self) -> dict[str, object]:
        driver = self.usage.driver
        return {
            "driver": {"release": driver.release, "cuda": driver.cuda and ".".join(map(str, driver.cuda))},
            "gpus": [self._described(gpu) for gpu in self.usage.gpus],
            "problem": self.usage.problem,
            "notes": [said for _, said in self.notes],
        }

    def _described(self, gpu: GpuState) -> dict[str, object]:
        rule, why = self.hidden.get(gpu.uuid or "", (None, None))
        name = self.names.get(gpu.uuid or "")
        return {
            "index": gpu.index,
            "instance": gpu.instance,
            "uuid": gpu.uuid,
            "name": gpu.name,
            "total_bytes": gpu.total,
            "used_bytes": gpu.used,
            "utilization_percent": gpu.utilization,
            "split": gpu.split,
            "problem": gpu.problem or None,
            "visible": None if gpu.split or gpu.problem else name is not None,
            "tensorflow": name,
            "explain_hidden": rule,
            "why": why,
        }

    def _row(self, gpu: GpuState) -> tuple[Cell | str, ...]:
        uuid, name = gpu.uuid or "?", self.names.get(gpu.uuid or "")
        visible = "" if gpu.split else Cell(name or "-", "green" if name else "dim")
        busy = "-" if gpu.utilization is None else f"{gpu.utilization}%"
        shown = uuid if is_wide() else uuid[:_SHORT_UUID]
        return (gpu.label, self._named(gpu), shown, _memory(gpu), busy, "?" if gpu.problem else visible)

    def _named(self, gpu: GpuState) -> str:
        """Of an instance, which stands below its GPU, what its name adds: "MIG 3g.40gb"."""
        whole = next((other.name for other in self.usage.gpus if other.index == gpu.index), None)
        name = gpu.name or "?"
        if gpu.instance is not None and whole and name.startswith(f"{whole} "):
            return f"  {name[len(whole) + 1 :]}"
        return f"{name} (split)" if gpu.split else name

    def _below(self) -> Iterable[tuple[str, str]]:
        """What hides GPUs, each reason once, then what is wrong."""
        reasons: dict[str, list[str]] = {}
        for gpu in self.usage.gpus:
            if why := self.hidden.get(gpu.uuid or ""):
                reasons.setdefault(why[1], []).append(gpu.label)
        yield from ((f"GPU {', '.join(labels)}", why) for why, labels in reasons.items())
        yield from ((f"GPU {gpu.label}", gpu.problem) for gpu in self.usage.gpus if gpu.problem)
        yield from self.notes


def _memory(gpu: GpuState) -> Cell:
    total = "?" if gpu.total is None else format_bytes(gpu.total)
    if gpu.used is None or gpu.total is None:
        return Cell(f"? / {total}")
    size, unit = format_bytes(gpu.used).rsplit(" ", 1)
    used = size if total.endswith(f" {unit}") else f"{size} {unit}"
    return Cell(f"{used if gpu.used else '0'} / {total}", "yellow" if gpu.used >= gpu.total * _FULL else "")


def _look() -> _Sight:
    usage, inventory = read_usage(), read_inventory()
    if usage.problem is not None:
        return _Sight(usage, notes=(("driver", usage.problem),))
    loaded = load(current_start())
    off, _ = check_disable_switch(loaded)
    if off:
        loaded = replace(loaded, policy=EffectivePolicy())
    grant, request = read_current_grant()
    decision = decide(loaded, grant, inventory, request)
    hidden = _hidden(decision, loaded, grant, inventory, request)
    return _Sight(
        usage,
        _names(decision, inventory, hidden),
        hidden,
        tuple(_notes(usage, decision, grant, off=off)),
    )


def _names(decision: Decision, inventory: Inventory, hidden: Mapping[str, object]) -> Mapping[str, str]:
    plan = decision.plan
    visible = [device.uuid for device in inventory.devices or () if device.uuid not in hidden]
    if plan.choosing is not None:
        return dict.fromkeys(visible, "may be chosen")
    if plan.devices is None:
        return dict.fromkeys(visible, "yes")
    known = {card.device.uuid: f"GPU:{place}" for place, card in enumerate(plan.devices) if card.device is not None}
    return {uuid: known.get(uuid, "?") for uuid in visible}


def _notes(usage: GpuUsage, decision: Decision, grant: Grant, *, off: bool) -> Iterator[tuple[str, str]]:
    if off:
        yield "policy", "switched off by TFGPU_DISABLE"
    if any(card.device is None for card in decision.plan.devices or ()):
        given = ",".join(grant.tokens or ())
        yield "?", f"CUDA_VISIBLE_DEVICES is {given}: without CUDA_DEVICE_ORDER=PCI_BUS_ID only CUDA can tell which"
    if not usage.gpus:
        yield "driver", "it shows no GPU; see what `nvidia-smi -L` says"


# ---- why not


def _hidden(
    decision: Decision, loaded: LoadedPolicy, grant: Grant, inventory: Inventory, request: Sequence[str] | None
) -> Mapping[str, tuple[str, str]]:
    if decision.refused or decision.no_gpu:
        follows = "`import tensorflow` raises PolicyError" if decision.refused else "programs see no GPU"
        why = ("on_error", f'{follows}: on_error is "{loaded.policy.on_error}", see `tfgpu explain`')
        return {device.uuid: why for device in inventory.devices or ()}
    reasons = explain_hidden(loaded.policy, grant, inventory, request)
    return {uuid: (by.rule, _in_words(by, grant, loaded)) for uuid, by in reasons.items()}


def _in_words(by: HiddenReason, grant: Grant, loaded: LoadedPolicy) -> str:
    where = _place(by.origin, loaded)
    return {
        "grant": f"not granted: CUDA_VISIBLE_DEVICES is {','.join(grant.tokens or ()) or 'empty'}",
        "require_grant": f"the scheduler granted none, and require_grant of {where} holds",
        "allowed_devices": f"not in allowed_devices of {where}",
        "visible_devices": f"not chosen by visible_devices of {where}",
        "request": "the program that started this one asked for others",
        "max_devices": f"over max_devices of {where}",
        "one_instance": "CUDA shows a process one MIG instance alone, or whole GPUs",
    }[by.rule]


def _place(origin: Origin | None, loaded: LoadedPolicy) -> str:
    """`file:line` of a key."""
    if origin is None:
        return ""
    found = [document for document in loaded.documents if document.source.path == origin.path]
    position = found[0].position(origin.key) if found else None
    return shown_path(origin.path) + (f":{position[0]}" if position else "")
