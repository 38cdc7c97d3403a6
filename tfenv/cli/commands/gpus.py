"""`tfgpu gpus`: every GPU of the machine, how full and busy it is, and whether the policy lets a program see it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tfenv.cli.display import add_display_options, show_snapshots
from tfenv.cli.output import FINDINGS, OK, add_description, shorten_path
from tfenv.cli.tables import StyledText, TableColumn, build_report, build_table, is_wide
from tfenv.cli.trends import TrendColumn, Trends, add_trend_columns
from tfenv.cli.walls import group_walls
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

_COLUMNS = (
    TableColumn("GPU"), TableColumn("name"), TableColumn("UUID"), TableColumn("memory used", is_number=True),
    TableColumn("busy", is_number=True),
    TableColumn("in programs"),
)  # fmt: skip
_TRENDS = ("memory", "busy")
_SHORT_UUID = len("GPU-12345678")
_FULL = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "For each GPU and MIG instance you see its names in a program started here, in TensorFlow and in JAX and "
        "PyTorch, or the reason why it is hidden. Exit codes: 0 ok, 1 the driver does not answer, 2 wrong usage.",
    )
    add_display_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return show_gpus(arguments.watch, arguments.format)


def show_gpus(seconds: float | None, output_format: str) -> int:
    """Show the GPUs once, or every some seconds. Return the exit code: 1 if NVML cannot be asked."""
    return FINDINGS if show_snapshots(_take_snapshot, seconds, output_format).usage.problem else OK


# ---- looking


@frozen
class GpuSnapshot:
    """The GPUs at one moment.

    Attributes:
        usage: What NVML tells.
        places: The place of each visible GPU among those that a program sees, by UUID. "yes" if the order is not
            known, "?" if it cannot be told whether the GPU is visible, "may be chosen" if `{count = …}` will choose.
        reasons: Why the others are hidden, by UUID: the rule, and the whole reason for people.
        notes: What concerns all of them: what it is about, and the text.
    """

    usage: GpuUsage
    places: Mapping[str, int | str] = field(default_factory=dict)
    reasons: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[tuple[str, str], ...] = ()

    def render(self, trends: Trends | None = None) -> RenderableType:
        """Return the table for people."""
        labels = [gpu.label for gpu in self.usage.gpus]
        added = [TrendColumn(f"{kind} trend", tuple(f"{kind} {label}" for label in labels)) for kind in _TRENDS]
        rows = list(map(self._build_row, self.usage.gpus))
        columns, rows_shown = add_trend_columns(_COLUMNS, rows, added, trends, expendable="UUID")
        return build_report(build_table(columns, rows_shown), self._find_all_notes())

    def list_samples(self) -> Mapping[str, float | None]:
        """Return how full and how busy each GPU is."""
        full = {f"memory {gpu.label}": _divide(*_get_shown_memory(gpu)) for gpu in self.usage.gpus}
        return {**full, **{f"busy {gpu.label}": _divide(gpu.utilization, 100) for gpu in self.usage.gpus}}

    def as_dict(self) -> dict[str, object]:
        """Return the same for programs."""
        driver = self.usage.driver
        return {
            "driver": {"release": driver.release, "cuda": driver.cuda and ".".join(map(str, driver.cuda))},
            "gpus": [self._describe_gpu(gpu) for gpu in self.usage.gpus],
            "problem": self.usage.problem,
            "notes": [text for _, text in self.notes],
        }

    def _describe_gpu(self, gpu: GpuState) -> dict[str, object]:
        rule, why = self.reasons.get(gpu.uuid or "", (None, None))
        place = self.places.get(gpu.uuid or "")
        return {
            "index": gpu.index,
            "instance": gpu.instance,
            "uuid": gpu.uuid,
            "name": gpu.name,
            "total_bytes": gpu.total,
            "used_bytes": gpu.used,
            "reserved_bytes": gpu.reserved,
            "wall": None if gpu.wall is None else gpu.wall.as_dict(),
            "utilization_percent": gpu.utilization,
            "split": gpu.split,
            "problem": gpu.problem or None,
            "visible": None if gpu.split or gpu.problem else place is not None,
            "ordinal": place if isinstance(place, int) else None,
            "tensorflow": f"GPU:{place}" if isinstance(place, int) else place,
            "hidden_by": rule,
            "why": why,
        }

    def _build_row(self, gpu: GpuState) -> tuple[StyledText | str, ...]:
        uuid, place = gpu.uuid or "?", self.places.get(gpu.uuid or "")
        visible = "" if gpu.split else StyledText(_format_place(place), "dim" if place is None else "green")
        busy = "-" if gpu.utilization is None else f"{gpu.utilization}%"
        uuid = uuid if is_wide() else uuid[:_SHORT_UUID]
        return (gpu.label, self._format_name(gpu), uuid, _format_memory(gpu), busy, "?" if gpu.problem else visible)

    def _format_name(self, gpu: GpuState) -> str:
        """Return the name. Of an instance, which is listed below its GPU, what it adds to that: "MIG 3g.40gb"."""
        whole = next((other.name for other in self.usage.gpus if other.index == gpu.index), None)
        name = gpu.name or "?"
        if gpu.instance is not None and whole and name.startswith(f"{whole} "):
            return f"  {name[len(whole) + 1 :]}"
        return f"{name} (split)" if gpu.split else name

    def _find_all_notes(self) -> Iterable[tuple[str, str]]:
        """Yield what hides GPUs, each reason once, then what is wrong."""
        labels_by_reason: dict[str, list[str]] = {}
        for gpu in self.usage.gpus:
            if reason := self.reasons.get(gpu.uuid or ""):
                labels_by_reason.setdefault(reason[1], []).append(gpu.label)
        yield from ((f"GPU {', '.join(labels)}", why) for why, labels in labels_by_reason.items())
        yield from ((f"GPU {gpu.label}", gpu.problem) for gpu in self.usage.gpus if gpu.problem)
        walls = group_walls((gpu.label, gpu.wall) for gpu in self.usage.gpus)
        yield from ((f"GPU {labels}", f"wall: {text}") for labels, text in walls)
        for gpu in self.usage.gpus:
            if gpu.wall is not None and gpu.used is not None and gpu.total is not None:
                yield f"GPU {gpu.label}", f"{format_bytes(gpu.used)} of the card's {format_bytes(gpu.total)} used"
        yield from self.notes


def _divide(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _format_place(place: int | str | None) -> str:
    """Return the names of a GPU in programs: TensorFlow's, and that of JAX and PyTorch."""
    if place is None:
        return "-"
    return f"GPU:{place}, cuda:{place}" if isinstance(place, int) else place


def _get_shown_memory(gpu: GpuState) -> tuple[int | None, int | None]:
    """Return the bytes in use and those that there are: of the card, or below a limit that the driver keeps here."""
    return (gpu.used, gpu.total) if gpu.wall is None else (gpu.wall.used, gpu.wall.limit)


def _format_memory(gpu: GpuState) -> StyledText:
    held, whole = _get_shown_memory(gpu)
    total = "?" if whole is None else format_bytes(whole)
    if held is None or whole is None:
        return StyledText(f"? / {total}")
    size, unit = format_bytes(held).rsplit(" ", 1)
    used = size if total.endswith(f" {unit}") else f"{size} {unit}"
    card = f" of {format_bytes(gpu.total)}" if gpu.wall is not None and gpu.total is not None and is_wide() else ""
    return StyledText(f"{used if held else '0'} / {total}{card}", "yellow" if held >= whole * _FULL else "")


def _take_snapshot() -> GpuSnapshot:
    usage, inventory = read_usage(), read_inventory()
    if usage.problem is not None:
        return GpuSnapshot(usage, notes=(("driver", usage.problem),))
    loaded = load(current_start())
    off, _ = check_disable_switch(loaded)
    if off:
        loaded = replace(loaded, policy=EffectivePolicy())
    grant, request = read_current_grant()
    decision = decide(loaded, grant, inventory, request)
    reasons = _explain_hidden_devices(decision, loaded, grant, inventory, request)
    places = _find_places(decision, inventory, reasons)
    return GpuSnapshot(usage, places, reasons, tuple(_find_notes(usage, decision, grant, off=off)))


def _find_places(decision: Decision, inventory: Inventory, reasons: Mapping[str, object]) -> Mapping[str, int | str]:
    plan = decision.plan
    visible = [device.uuid for device in inventory.devices or () if device.uuid not in reasons]
    if plan.choosing is not None:
        return dict.fromkeys(visible, "may be chosen")
    if plan.devices is None:
        return dict.fromkeys(visible, "yes")
    known = {card.device.uuid: place for place, card in enumerate(plan.devices) if card.device is not None}
    return {uuid: known.get(uuid, "?") for uuid in visible}


def _find_notes(usage: GpuUsage, decision: Decision, grant: Grant, *, off: bool) -> Iterator[tuple[str, str]]:
    if off:
        yield "policy", "switched off by TFGPU_DISABLE=1"
    if any(card.device is None for card in decision.plan.devices or ()):
        given = ",".join(grant.tokens or ())
        yield (
            "?",
            f"CUDA_VISIBLE_DEVICES is {given}: only CUDA can tell which these are unless CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    if not usage.gpus:
        yield "driver", "it lists no GPU; compare it with the output of `nvidia-smi -L`"


# ---- why not


def _explain_hidden_devices(
    decision: Decision, loaded: LoadedPolicy, grant: Grant, inventory: Inventory, request: Sequence[str] | None
) -> Mapping[str, tuple[str, str]]:
    if decision.refused or decision.no_gpu:
        follows = "the import of a framework raises PolicyError" if decision.refused else "programs see no GPU"
        why = ("on_error", f'{follows}: on_error is "{loaded.policy.on_error}", see `tfgpu explain`')
        return {device.uuid: why for device in inventory.devices or ()}
    reasons = explain_hidden(loaded.policy, grant, inventory, request)
    return {uuid: (reason.rule, _describe_reason(reason, grant, loaded)) for uuid, reason in reasons.items()}


def _describe_reason(reason: HiddenReason, grant: Grant, loaded: LoadedPolicy) -> str:
    where = _locate_key(reason.origin, loaded)
    return {
        "grant": f"not in CUDA_VISIBLE_DEVICES, which is {','.join(grant.tokens or ()) or 'empty'}",
        "require_grant": f"the scheduler gave this job none, and require_grant in {where} is set",
        "allowed_devices": f"not in allowed_devices of {where}",
        "visible_devices": f"not chosen by visible_devices of {where}",
        "request": "the parent program asked for other GPUs",
        "max_devices": f"beyond max_devices of {where}",
        "one_instance": "CUDA shows a process either one MIG instance or whole GPUs",
    }[reason.rule]


def _locate_key(origin: Origin | None, loaded: LoadedPolicy) -> str:
    """Return `file:line` of a key. "" if it has no place."""
    if origin is None:
        return ""
    found = [document for document in loaded.documents if document.source.path == origin.path]
    position = found[0].find_position(origin.key) if found else None
    return shorten_path(origin.path) + (f":{position[0]}" if position else "")
