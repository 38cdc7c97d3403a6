"""The text of a first tfgpu.toml: what fits the GPUs of this machine and the policy that it has already."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from itertools import groupby

from tfenv.cli.output import format_toml, shorten_path
from tfenv.config.presence import FILE_NAME
from tfenv.config.schema_copy import SCHEMA_LINE, TEST_SCHEMA_LINE
from tfenv.devices.inventory import read_inventory
from tfenv.errors import escape_for_terminal
from tfenv.machine_date import find_today
from tfenv.pipeline import current_start, load
from tfenv.policy.merge import merge
from tfenv.policy.model import Device, EffectivePolicy, Grant, Inventory, Origin, PlannedDevice, Selector, Setting
from tfenv.policy.resolve import resolve
from tfenv.policy.units import format_bytes
from tfenv.simulate.environment import parse_gpus
from tfenv.simulate.inventory import list_devices
from tfenv.values import frozen, replace

_GIB, _MIB = 1 << 30, 1 << 20
#: GPUs that are listed one by one.
_MOST_LISTED = 8
_FALLBACK_LIMIT = "45%"
#: After so many days the exception ends that a machine's policy shows.
_DAYS_OF_EXCEPTION = 180
#: What tests describe where no GPU is known.
_EXAMPLE_GPUS = "4x80GiB"

_TEMPLATE = """\
{schema}

# The GPU policy of this project. Every Python process started in this directory or below it applies it.
# Run `tfgpu check` to find mistakes, and `tfgpu explain` to see the effect. Uncomment what you need.

version = 1

# What to do if part of this file cannot be applied:
# "warn" prints a warning, "cpu" hides all GPUs, "fail" stops the program when it imports a framework.
on_error = "warn"
{context}
[gpu]
# Allocate memory when it is needed, instead of nearly all of it at the start.
memory_growth = true

{visible}

{limit}

# Ceilings. Programs and other files can ask for less, never for more.
# [ceiling]
# memory_limit = "50%"
"""

_MACHINE_TEMPLATE = """\
{schema}

# The GPU policy of this machine. It applies to every Python process of every user.
# Run `tfgpu check /etc/tfgpu` to find mistakes. As root, run `tfgpu explain --user NAME` to see the effect for a user.
#
# You can put exceptions into groups/NAME.toml and users/NAME.toml beside this file. Their [gpu] and [ceiling] are the
# same as [group.NAME.gpu] and so on in this file. The more specific table replaces the less specific one, key by key.

version = 1

# What to do if part of a policy cannot be applied:
# "warn" prints a warning, "cpu" hides all GPUs, "fail" stops the program when it imports a framework.
on_error = "warn"

# ---- Settings: defaults. Users and projects can set other values in their own files.

[gpu]
# Allocate memory when it is needed, instead of nearly all of it at the start.
memory_growth = true

# Give each process a free GPU.
# visible_devices = {{ count = 1 }}

# The memory that one process may use of a GPU. {limit_reason}
# memory_limit = "{limit}"

# The memory allocator of TensorFlow and JAX. A memory limit needs "bfc".
# allocator = "bfc"

# How the frameworks of one process share its memory limit.
# frameworks = {{ tensorflow = "{third}", jax = "{third}", torch = "{third}" }}

# Different values for some GPUs, or GPUs split into smaller logical ones.
# [[gpu.device]]
# match = {match}
# memory_limit = "{device_limit}"
# logical_devices = ["{part}", "{part}"]

# ---- Ceilings: the most that anybody gets, whatever files and programs ask for.

[ceiling]
{devices}

# The most GPUs of one process. Use it with visible_devices = {{ count = 1 }}, or everybody gets the first GPU.
# max_devices = 1

# The most memory of a GPU that one process may use, and that all processes of one user may use together.
# memory_limit = "50%"
# memory_total = "60%"

# Make memory grow on demand, even if a program turns it off.
# require_memory_growth = true

# In a scheduler's job without GPUs, hide all GPUs.
# require_grant = true

# The same keys for some users, groups or directories only. An exception can have an end and a reason.
# [user.alice]
# expires = {expires}
# reason = "thesis"
# [user.alice.gpu]
# memory_limit = "20%"
# [group.students.ceiling]
# memory_limit = "25%"
# [project."/srv/inference".ceiling]
# max_devices = 2

# ---- Tomorrow's limits: what these tables would change is recorded, and not applied.

# [observe]
# Say on stderr what the program would lose.
# tell = true
# [observe.ceiling]
# memory_limit = "25%"

# ---- The log of what was applied. Without a file here, each user has one in ~/.local/state/tfgpu.

[audit]
# A file for each user, in a directory that only root can write to.
# file = "/var/log/tfgpu/<uid>.jsonl"

# Also write to journald or syslog, where users cannot change records.
# syslog = true

# What a program prints to stderr: "summary" is one line, "json" is the same for programs, "none" is nothing.
# stderr = "summary"

# ---- What users may do

[machine]
# Ignore TFGPU_DISABLE=1, with which users switch the policy off.
# allow_disable = false

# Ignore the files of projects.
# allow_project_files = false

# Accept project files that these users own, besides root and the user who runs the program.
# trusted_owners = ["deploy"]

# The memory that a process uses of a GPU on top of its limit, for the CUDA context and libraries.
# process_overhead = "600MiB"

# What you call this version of the policy. Records show it.
# revision = "1"

# How many shards a GPU has in Slurm. memory_limit = "granted" needs it: no process takes more than its job's shards.
# shards_per_gpu = 4

# Do not have the driver keep memory_total. `tfgpu wall apply` then clears the limits of users.
# wall = "off"
"""

_TESTS_TEMPLATE = """\
{schema}

# What the policy beside this file is to give to whom. Run `tfgpu test` with this directory after each change. It needs
# no GPU. What is not named in [case.expect] is not compared.

version = 1

[defaults]
{gpus}

[[case]]
name = "everybody has all GPUs, and memory grows on demand"

[case.expect]
devices = {count}
memory_growth = true
memory_limit = "none"
findings = []

# Change what is expected here when you uncomment [group.students.ceiling] in the policy: to "25%", for one.
[[case]]
name = "a student has no limit"
user = "sam"
groups = ["students"]

[case.expect]
memory_limit = "none"

# And here, when you uncomment [user.alice.gpu], or write users/alice.toml.
[[case]]
name = "alice is an exception among the students"
user = "alice"
groups = ["students"]

[case.expect]
memory_limit = "none"
"""


# ---- a project's


@frozen
class Surroundings:
    """What a new project policy has to fit.

    Attributes:
        inventory: The machine's GPUs.
        policy: What the machine's file and the user's own set.
        devices: The GPUs that this policy allows. None: they are not known.
    """

    inventory: Inventory
    policy: EffectivePolicy
    devices: tuple[PlannedDevice, ...] | None


def survey(folder: str) -> Surroundings:
    """Look at the GPUs, and at the policy that applies in a directory without a project's file."""
    loaded = load(replace(current_start(folder), config=None, run=None))
    replaced = os.path.join(folder, FILE_NAME)
    kept = [layer for layer in loaded.layers if layer.name != "project" and replaced not in layer.paths]
    policy = merge(kept, loaded.subject)
    inventory = read_inventory()
    if not inventory.devices:
        return Surroundings(inventory, policy, None)
    allowed = [planned for device in inventory.devices for planned in _plan_alone(device, policy, inventory)]
    return Surroundings(inventory, policy, tuple(allowed))


def _plan_alone(device: Device, policy: EffectivePolicy, inventory: Inventory) -> tuple[PlannedDevice, ...]:
    """Return what a process that asks for one GPU gets of it. () if the policy does not allow this GPU."""
    asked = Setting((Selector("uuid", device.uuid),), Origin("project", FILE_NAME, ("gpu", "visible_devices")))
    ceilings = tuple(ceiling for ceiling in policy.ceilings if ceiling.key != "max_devices")
    alone = replace(policy, settings={**policy.settings, "visible_devices": asked}, ceilings=ceilings)
    # One that is not allowed is replaced by those that are.
    planned = resolve(alone, Grant(), inventory).devices or ()
    return tuple(each for each in planned if each.device is not None and each.device.uuid == device.uuid)


def format_project_policy(around: Surroundings) -> str:
    """Return the text of a project's first policy. Only memory growth and the choice of a free GPU are in force."""
    context = "\n".join(_format_policy_in_force(around))
    return _TEMPLATE.format(
        schema=SCHEMA_LINE,
        context=f"\n{context}\n" if context else "",
        visible="\n".join(_format_visible_devices(around)),
        limit="\n".join(_format_memory_limit(around)),
    )


def _format_policy_in_force(around: Surroundings) -> list[str]:
    """Return what the policy of the machine and of the user already says about GPUs."""
    ceilings = around.policy.ceilings
    facts: list[str] = []
    if any(ceiling.key == "allowed_devices" for ceiling in ceilings) and around.devices is not None:
        facts.append(f"{len(around.devices)} of {len(around.inventory.devices or ())} GPUs")
    facts += [f"max_devices = {ceiling.value}" for ceiling in ceilings if ceiling.key == "max_devices"]
    limits = _list_existing_limits(around.devices or ())
    if limits:
        facts.append(f"at most {' or '.join(format_bytes(limit) for limit in limits)} of a GPU")
    origins = [ceiling.origin for ceiling in ceilings] + [each.origin for each in around.policy.settings.values()]
    paths = list(dict.fromkeys(origin.path for origin in origins))
    if not paths:
        return []
    said = f": {', '.join(facts)}" if facts else ""
    return [
        f"# {' and '.join(map(shorten_path, paths))} already {'apply' if paths[1:] else 'applies'} here{said}.",
        "# This file cannot lift those ceilings.",
    ]


def _list_existing_limits(devices: Iterable[PlannedDevice]) -> list[int]:
    limits = {device.limit.on(device.total) for device in devices if device.limit is not None}
    return sorted(limit for limit in limits if limit is not None)


def _format_visible_devices(around: Surroundings) -> list[str]:
    """Return the lines about `visible_devices`. A free GPU is proposed where there are several."""
    names = '"all", "none", positions ([0, 1]), UUIDs (`nvidia-smi -L`) or names (["name:*A100*"]).'
    if around.devices is None:
        return [
            "# Which GPUs to use. Remove the # of the last line to take a free one. You can also write",
            f"# {names}",
            "# visible_devices = { count = 1 }",
        ]
    cards = [planned.device for planned in around.devices if planned.device is not None]
    listed = _format_cards(cards)
    if len(cards) < 2:  # noqa: PLR2004 - there is nothing to choose from
        return listed
    said = around.policy.settings.get("visible_devices")
    if said is not None:
        return [
            *listed,
            f"# {shorten_path(said.origin.path)} already chooses for you. Write another choice here to replace it.",
            "# visible_devices = { count = 1 }",
        ]
    return [
        *listed,
        "# Each process takes a free one, or the least used one if all are busy.",
        f"# You can also write {names}",
        'visible_devices = { count = 1, when_busy = "share" }',
    ]


def _format_cards(cards: Sequence[Device]) -> list[str]:
    """Return what GPUs there are. Those that are alike are in one line."""
    if not cards:
        return ["# The policy that applies here allows no GPU. Run `tfgpu explain` to see why."]
    kinds = Counter(map(_describe, cards))
    thing = "GPU" if any(card.instance is None for card in cards) else "MIG instance"
    if len(cards) == 1:
        return [f"# `tfgpu init` found one {thing}: {_describe(cards[0])}."]
    if len(kinds) == 1:
        return [f"# `tfgpu init` found {len(cards)} {thing}s: {_describe(cards[0])} each."]
    if len(cards) > _MOST_LISTED:
        lines = [f"#   {count} x {text}" for text, count in kinds.items()]
    else:
        lines = [f"#   {_shorten_uuid(card)}  {_describe(card)}" for card in cards]
    return [f"# `tfgpu init` found {len(cards)} {thing}s:", *lines]


def _describe(card: Device) -> str:
    size = "" if card.total is None else f", {format_bytes(card.total)}"
    return f"{escape_for_terminal(card.name)}{size}"


def _shorten_uuid(card: Device) -> str:
    """Return enough of a UUID to name the GPU. The beginning of a MIG instance's may be that of others, too."""
    return card.uuid if card.uuid.startswith("MIG-") else card.uuid[: len("GPU-") + 8]


def _format_memory_limit(around: Surroundings) -> list[str]:
    """Return the lines about `memory_limit`, with a value that lets two processes share a GPU."""
    about = '# The memory that one process may use of a GPU, as a size or in percent: "8GiB", "40%".'
    cards = [planned for planned in around.devices or () if planned.device is not None and planned.total]
    totals = sorted({planned.total or 0 for planned in cards})
    if not totals:
        return [about, f'# memory_limit = "{_FALLBACK_LIMIT}"']
    overhead = around.policy.process_overhead
    existing = _list_existing_limits(cards)
    if len(totals) == 1:
        limit, size = _share_in_bytes(totals[0], overhead), _share_as_size(totals[0], overhead)
        if existing and existing[0] <= limit:
            return [about, f'# memory_limit = "{_format_size(existing[0])}"']
        return [about, f"# Two processes with this limit fit on a GPU of {format_bytes(totals[0])}.",
                f'# memory_limit = "{size}"']  # fmt: skip
    return [
        about,
        "# Two processes with this limit fit on any of these GPUs.",
        f'# memory_limit = "{_share_in_percent(totals[0], overhead)}%"',
        *_format_device_example(cards, overhead),
    ]


def _format_device_example(cards: Sequence[PlannedDevice], overhead: int) -> list[str]:
    """Return an example of `[[gpu.device]]` for the largest GPU."""
    largest = max(cards, key=lambda planned: planned.total or 0)
    device = largest.device
    if device is None or largest.total is None:
        return []
    return [
        "",
        "# A limit of its own for some GPUs.",
        "# [[gpu.device]]",
        f"# match = {_format_match(device, [planned.device for planned in cards if planned.device is not None])}",
        f'# memory_limit = "{_share_as_size(largest.total, overhead)}"',
    ]


def _format_match(device: Device, cards: Sequence[Device]) -> str:
    """Return what names a GPU and those like it: its product name, or the UUID where the name does not tell."""
    namesakes = {card.total for card in cards if card.name == device.name}
    if len(namesakes) > 1 or not device.name.isprintable() or set(device.name) & set("*?["):
        return format_toml(_shorten_uuid(device))
    return format_toml(f"name:{device.name}")


# ---- amounts


def _share_in_bytes(total: int, overhead: int) -> int:
    """Return the limit with which two processes fit on a GPU."""
    return max(total // 2 - overhead, 256 * _MIB)


def _share_as_size(total: int, overhead: int) -> str:
    return _format_size(_share_in_bytes(total, overhead))


def _format_size(size: int) -> str:
    """Return an amount of memory as a policy has it, rounded down to whole GiB, or to 256 MiB if it is small."""
    return f"{size // _GIB}GiB" if size >= 4 * _GIB else f"{max(size // (256 * _MIB), 1) * 256}MiB"


def _share_in_percent(total: int, overhead: int) -> int:
    return max(_share_in_bytes(total, overhead) * 100 // total // 5 * 5, 5)


# ---- the machine's


def format_machine_policy(inventory: Inventory, overhead: int) -> str:
    """Return the text of a machine's first policy. It names all GPUs, and only memory growth is in force.

    Args:
        inventory: The machine's GPUs.
        overhead: Bytes that a process takes beside its limit.
    """
    cards = [card for card in inventory.devices or () if card.total]
    totals = [card.total for card in cards if card.total is not None]
    largest = max(cards, key=lambda card: card.total or 0, default=None)
    share = _share_in_percent(min(totals), overhead) if totals else 45
    device_limit = _share_in_bytes(max(totals), overhead) if totals else 60 * _GIB
    return _MACHINE_TEMPLATE.format(
        schema=SCHEMA_LINE,
        expires=date.fromisoformat(find_today()) + timedelta(days=_DAYS_OF_EXCEPTION),
        limit=f"{share}%",
        third=f"{share // 3}%",
        limit_reason=f"With {share}%, two processes fit on one.",
        match=_format_match(largest, cards) if largest is not None else '"name:*H200*"',
        device_limit=_format_size(device_limit),
        part=_format_size(device_limit // 2),
        devices="\n".join(_format_allowed_devices(inventory)),
    )


def _format_allowed_devices(inventory: Inventory) -> Iterable[str]:
    """Return the lines about `allowed_devices`, with the UUIDs of all GPUs that are here."""
    yield "# The GPUs that may be used at all. Use UUIDs: numbers change inside containers and jobs."
    if not inventory.devices:
        yield f"# The GPUs of this machine are not known: {explain_no_gpu(inventory)}."
        yield '# allowed_devices = ["GPU-8932f937"]'
        return
    yield "# allowed_devices = ["
    yield from (f'#     "{card.uuid}",  # {card.label}: {_describe(card)}' for card in inventory.devices)
    yield "# ]"


def explain_no_gpu(inventory: Inventory) -> str:
    """Return why no GPU is known, and how to find the UUIDs."""
    problem = "NVML lists none" if inventory.devices is not None else inventory.problem or "NVML did not answer"
    return f"{escape_for_terminal(problem)}; `nvidia-smi -L` shows UUIDs"


def format_machine_tests(inventory: Inventory) -> str:
    """Return the text of the tests of a machine's first policy. They pass, and describe this machine's GPUs.

    Args:
        inventory: The machine's GPUs.
    """
    described = _describe_gpus(inventory)
    known = inventory.devices if described is not None else None
    lines = ["# The GPUs of the machine, as `tfgpu simulate` takes them.", f'gpus = "{described or _EXAMPLE_GPUS}"']
    if known is not None:
        lines += ["uuids = [", *(f'  "{card.uuid}", # {card.label}: {_describe(card)}' for card in known), "]"]
    cards = list_devices(parse_gpus(_EXAMPLE_GPUS)) if known is None else inventory
    plan = resolve(EffectivePolicy(), Grant(), cards)
    count = len(cards.devices or ()) if plan.devices is None else len(plan.devices)
    return _TESTS_TEMPLATE.format(schema=TEST_SCHEMA_LINE, gpus="\n".join(lines), count=count)


def _describe_gpus(inventory: Inventory) -> str | None:
    """Return the machine's GPUs as `tfgpu simulate` takes them. None: they are not known, or cannot be simulated."""
    cards: dict[int, list[Device]] = {}
    for card in inventory.devices or ():
        cards.setdefault(card.index, []).append(card)
    groups = (f"{len(list(same))}x{text}" for text, same in groupby(map(_describe_gpu, cards.values())))
    text = ",".join(groups)
    try:
        return text if len(list_devices(parse_gpus(text)).devices or ()) == len(inventory.devices or ()) else None
    except ValueError:
        return None


def _describe_gpu(parts: Sequence[Device]) -> str:
    """Return a GPU, of which these are the MIG instances if there are several or it is split."""
    sizes = [(part.total or 0) // _MIB for part in parts]
    split = "" if parts[0].instance is None else f"/mig={'+'.join(map(_format_mib, sizes))}"
    return f"{_format_mib(sum(sizes))}{split}:{parts[0].name.partition(' MIG ')[0]}"


def _format_mib(size: int) -> str:
    return f"{size}MiB" if size % 1024 else f"{size // 1024}GiB"
