"""The nouns of the project: the values that pass along the line from file to record.

Pure and immutable. Sizes are in bytes unless a name says otherwise, fractions are in 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from tfenv.errors import Finding, escape_for_terminal
from tfenv.values import field, frozen

LayerName = Literal["machine", "site", "user", "project", "run"]
#: From the least specific to the nearest: the nearest layer that sets a key wins.
LAYER_ORDER: tuple[LayerName, ...] = ("machine", "site", "user", "project", "run")

OnError = Literal["warn", "cpu", "fail"]
#: From the mildest to the strictest.
ON_ERROR_ORDER: tuple[OnError, ...] = ("warn", "cpu", "fail")

Allocator = Literal["bfc", "cuda_malloc", "cuda_malloc_async"]

#: The path of a key inside a document: ("gpu", "device", 0, "match").
KeyPath = tuple["str | int", ...]


def format_key(key: KeyPath) -> str:
    """Return the key as a reader writes it: `gpu.device[0].match`."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part and part.replace("_", "").replace("-", "").isalnum() and part.isascii():
            text += f".{part}" if text else part
        else:
            quoted = escape_for_terminal(part.replace("\\", "\\\\").replace('"', '\\"'))
            text += f'."{quoted}"' if text else f'"{quoted}"'
    return text


@frozen
class Start:
    """What this process was when it started. The program may change its environment later.

    Attributes:
        cwd: Working directory. None: it was deleted.
        uid: Effective user id.
        program_folders: Where a project's file is looked for if there is none above `cwd`, in this order.
        site: TFGPU_SITE_CONFIG. None: it is unset.
        config: TFGPU_CONFIG. None: it is unset.
        run: The policy text of `tfgpu run` options (TFGPU_RUN). None: it is unset.
        home: Home directory, from the passwd entry of the euid. None: there is no entry.
        config_home: The user's configuration directory ($XDG_CONFIG_HOME, or ~/.config). None: there is no home.
        state_home: The user's directory for logs, if $XDG_STATE_HOME names one. None: ~/.local/state.
        disable: TFGPU_DISABLE. None: it is unset.
        disabled_late: The program itself set TFGPU_DISABLE=1, which is too late.
        elevated: The process runs under sudo or setuid, so that only the machine layer counts.
        isolated: `python -I` or `-E`: no walk from cwd, no variables.
    """

    cwd: str | None
    uid: int
    program_folders: tuple[str, ...] = ()
    site: str | None = None
    config: str | None = None
    run: str | None = None
    home: str | None = None
    config_home: str | None = None
    state_home: str | None = None
    disable: str | None = None
    disabled_late: bool = False
    elevated: bool = False
    isolated: bool = False


@frozen
class Source:
    """A file that was found.

    Attributes:
        layer: The layer its settings belong to.
        path: Absolute path, or "<tfgpu run>" for the text of a command line.
        text: The content itself where there is no file to open (layer "run").
        table: Where the policy starts in the document: () or ("tool", "tfgpu").
        scope: For whom its `[gpu]` and `[ceiling]` are. A machine file `groups/NAME.toml` counts as `[group.NAME]`,
            `users/NAME.toml` as `[user.NAME]`. None: everybody.
        start_owner: uid of the owner of the directory the process started in. Files of that owner count too. None for
            a site's file, whose author has nothing to do with that directory.
        required: TFGPU_CONFIG or TFGPU_SITE_CONFIG names it, so that a finding reports a missing file.
    """

    layer: LayerName
    path: str
    text: str | None = None
    table: tuple[str, ...] = ()
    scope: tuple[Literal["group", "user"], str] | None = None
    start_owner: int | None = None
    required: bool = False


@frozen
class Origin:
    """Where a value was set. The position inside the file is looked up only when somebody asks."""

    layer: LayerName
    path: str
    key: KeyPath

    def __str__(self) -> str:
        return f"{self.path} ({format_key(self.key)})"


def format_origins(origins: Iterable[Origin]) -> str:
    """Join origins for people: `/etc/tfgpu/tfgpu.toml (ceiling.max_devices) and tfgpu.toml (gpu.memory_limit)`."""
    return " and ".join(str(origin) for origin in origins)


@frozen
class Setting:
    """One value and where it was set."""

    value: object
    origin: Origin


#: One table of a layer, `[gpu]` or `[ceiling]`: key -> Setting, values already of the types below.
Table = Mapping[str, Setting]


@frozen
class Tables:
    """The tables that exist per layer and per subject."""

    gpu: Table = field(default_factory=dict)
    ceiling: Table = field(default_factory=dict)


@frozen
class DatedTable:
    """A table of one user, group or project that has an end or a reason.

    Attributes:
        kind: Whose it is.
        name: The user's or group's name, or the project's path.
        origin: The table.
        expires: The day from which it does not count, as "2027-01-31". None: it has no end.
        reason: Why it exists. "": nobody says.
        expired: That day has come, so the layer is without the table's values.
    """

    kind: Literal["user", "group", "project"]
    name: str
    origin: Origin
    expires: str | None = None
    reason: str = ""
    expired: bool = False

    def holds(self, origin: Origin) -> bool:
        """Return whether a value stands in this table."""
        key = self.origin.key
        return origin.path == self.origin.path and origin.key[: len(key)] == key

    def describe_end(self) -> str:
        """Return the end and the reason in words: "expires on 2027-01-31 (thesis)", "no end (thesis)"."""
        verb = "expired" if self.expired else "expires"
        end = "no end" if self.expires is None else f"{verb} on {self.expires}"
        return f"{end} ({escape_for_terminal(self.reason)})" if self.reason else end


@frozen
class Layer:
    """A validated layer: one file, or the several files of the machine layer's one author.

    Attributes:
        top: Keys at the top of the file (`on_error`).
        base: `[gpu]` and `[ceiling]`.
        groups: `[group.NAME.*]` in the order of the files. A name occurs once for each file that has it.
        users: `[user.NAME.*]`.
        projects: `[project."PATH".*]`, machine layer only.
        audit: `[audit]`, one table per file of the layer. Their sinks add up.
        machine: `[machine]`, machine layer only.
        paths: The files it was read from.
        dated: The tables of users, groups and projects that have an end or a reason.
        observed: The tables under `[observe]`, with `tell` at the top. None: there are none.
    """

    name: LayerName
    top: Table = field(default_factory=dict)
    base: Tables = field(default_factory=Tables)
    groups: tuple[tuple[str, Tables], ...] = ()
    users: Mapping[str, Tables] = field(default_factory=dict)
    projects: Mapping[str, Tables] = field(default_factory=dict)
    audit: tuple[Table, ...] = ()
    machine: Table = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    dated: tuple[DatedTable, ...] = ()
    observed: Layer | None = None


@frozen
class Subject:
    """The user and the project for which a policy is merged.

    Attributes:
        user: Name from the passwd entry of the euid, or "uid:1234" without one.
        uid: Effective user id.
        groups: Names of all groups, supplementary ones too, or "gid:1234" without an entry.
        project: Absolute path of the project: the directory of its file, or the start directory.
    """

    user: str
    uid: int
    groups: tuple[str, ...] = ()
    project: str | None = None


# ---- values of settings and ceilings


@frozen
class MemoryLimit:
    """The most that a process may take of one GPU's memory.

    Without `bytes` and `fraction` it is explicitly unlimited ("none"). With both the smaller of the two holds.

    Attributes:
        bytes: The size.
        fraction: The share of the card's total.
        granted: It is "granted". `policy.shares` puts the share that the launcher gave in its place.
    """

    bytes: int | None = None
    fraction: float | None = None
    granted: bool = False

    @property
    def unlimited(self) -> bool:
        """Whether it is explicitly no limit."""
        return self.bytes is None and self.fraction is None and not self.granted

    @property
    def mixed(self) -> bool:
        """Whether a size and a share hold together."""
        return self.bytes is not None and self.fraction is not None

    def on(self, total: int | None) -> int | None:
        """Return the limit in bytes on a card of `total` bytes. None: unlimited, or unknown without the total."""
        if self.fraction is None or total is None:
            return self.bytes
        share = int(total * self.fraction)
        return share if self.bytes is None else min(share, self.bytes)


@frozen
class Selector:
    """What names GPUs: a position, a UUID (or the beginning of one), a MIG token, or a glob on the product name."""

    kind: Literal["position", "uuid", "name"]
    text: str

    @property
    def position(self) -> int:
        """The number of a selector by position."""
        return int(self.text)

    def __str__(self) -> str:
        return f"name:{self.text}" if self.kind == "name" else self.text


@frozen
class AutoChoice:
    """`{count = 1, prefer = "most_free", …}`: tfenv chooses the GPUs.

    Attributes:
        count: How many GPUs.
        prefer: Which of the free ones come first.
        min_free: A GPU with less free memory is busy.
        when_busy: "wait", "cpu", "fail" or "share".
        timeout_s: Seconds to wait at most. None: as long as it takes.
    """

    count: int
    prefer: str = "most_free"
    min_free: MemoryLimit | None = None
    when_busy: str = "wait"
    timeout_s: float | None = None


@frozen
class RankChoice:
    """`{rank = "auto"}`: each local rank takes its own place in the list."""

    rank: Literal["auto"] | int = "auto"


#: The value of `visible_devices`. Selectors keep the order in which they were written. () is "none".
VisibleDevices = Literal["all"] | tuple[Selector, ...] | AutoChoice | RankChoice


@frozen
class DeviceRule:
    """One `[[gpu.device]]` entry.

    Attributes:
        match: The GPUs it is for.
        memory_limit: Replaces the table's `memory_limit` for them.
        logical_devices: The sizes of the logical GPUs they are split into.
        origin: Where it was set.
    """

    match: Selector
    origin: Origin
    memory_limit: MemoryLimit | None = None
    logical_devices: tuple[MemoryLimit, ...] = ()


CeilingKey = Literal[
    "allowed_devices", "max_devices", "memory_limit", "memory_total", "require_memory_growth", "require_grant"
]


@frozen
class Ceiling:
    """One bound that holds together with all others.

    Attributes:
        key: The key in `[ceiling]`.
        value: tuple[Selector, ...] for allowed_devices, int for max_devices, MemoryLimit for memory_limit and
            memory_total, bool for require_memory_growth and require_grant.
        origin: Where it was set.
    """

    key: CeilingKey
    value: object
    origin: Origin


@frozen
class AuditSinks:
    """Where records go: the sum of all layers' sinks.

    Attributes:
        stderr: What a process tree writes to stderr once.
        files: Absolute paths of logs, as configured. The audit expands "~" and "<uid>".
        required_files: The files that the machine layer asks for.
        syslog: Records also go to syslog or journald.
        required_syslog: The machine layer asks for that.
        default_file: Records also go to the user's own log. A project cannot switch it off.
        default_log: Where that is, as configured.
    """

    stderr: Literal["summary", "none", "json"] = "summary"
    files: tuple[str, ...] = ()
    required_files: tuple[str, ...] = ()
    syslog: bool = False
    required_syslog: bool = False
    default_file: bool = True
    default_log: str = "~/.local/state/tfgpu/audit.jsonl"


#: Bytes of a GPU that a process takes beside its limit, unless the machine layer says otherwise (docs/hardware.md).
DEFAULT_OVERHEAD = 600 << 20


@frozen
class EffectivePolicy:
    """All layers merged for one subject. Every value has its Origin.

    Attributes:
        settings: visible_devices (VisibleDevices), memory_growth (bool), memory_limit (MemoryLimit),
            allocator (Allocator), frameworks (Mapping[str, MemoryLimit]), device (tuple[DeviceRule, ...]).
        overridden: For each key the settings that lost, nearest first.
        ceilings: Those of all layers. They hold together.
        on_error: The strictest any layer asks for.
        audit: Sinks of all layers.
        allow_disable: TFGPU_DISABLE=1 may switch the policy off.
        paths: Every file that was merged.
        process_overhead: Bytes that a process takes of a GPU beside its limit.
        shards_per_gpu: How many shards Slurm splits a GPU into. None: the machine layer does not say.
        revision: What the machine layer calls this version of itself. None: it does not say.
        wall: What the machine layer says of limits that the driver keeps: "auto", or "off" for none.
    """

    settings: Table = field(default_factory=dict)
    overridden: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)
    ceilings: tuple[Ceiling, ...] = ()
    on_error: OnError = "warn"
    audit: AuditSinks = field(default_factory=AuditSinks)
    allow_disable: bool = True
    paths: tuple[str, ...] = ()
    process_overhead: int = DEFAULT_OVERHEAD
    shards_per_gpu: int | None = None
    revision: str | None = None
    wall: Literal["auto", "off"] = "auto"

    @property
    def silent(self) -> bool:
        """Whether nothing about GPUs is declared, so that programs are left as they are."""
        return not self.settings and not self.ceilings

    @property
    def origins(self) -> frozenset[Origin]:
        """Where its settings and ceilings were set."""
        return frozenset([*(setting.origin for setting in self.settings.values()), *(c.origin for c in self.ceilings)])

    def list_ceilings(self, *keys: CeilingKey) -> list[Ceiling]:
        """Return the ceilings of these keys, in an order that does not depend on how they were collected."""

        def get_sort_key(ceiling: Ceiling) -> tuple[int, str, str]:
            return LAYER_ORDER.index(ceiling.origin.layer), ceiling.origin.path, format_key(ceiling.origin.key)

        return sorted((ceiling for ceiling in self.ceilings if ceiling.key in keys), key=get_sort_key)


@frozen
class ObservedPolicy:
    """What the policy would be if the tables under `[observe]` were in force. Nothing of it is applied.

    Attributes:
        policy: All layers merged so.
        tell: The line on stderr says what the process would lose.
    """

    policy: EffectivePolicy
    tell: bool = False


@frozen
class WouldClamp:
    """What a process has at an entry point and would not have under the observed policy.

    Attributes:
        key: The key that would take it away: "memory_limit", "visible_devices", "memory_growth".
        asked: What the process has now: "8.0 GiB", "no limit", "on".
        given: What it would have: "4.0 GiB".
        gpu: UUID of the GPU, or its token. "": it is about no single GPU.
        asked_bytes: `asked` in bytes. None: it is no size, or the card's size is not known.
        given_bytes: `given` in bytes, likewise.
        held_by: The keys that would hold.
    """

    key: str
    asked: str
    given: str
    gpu: str = ""
    asked_bytes: int | None = None
    given_bytes: int | None = None
    held_by: tuple[Origin, ...] = ()


# ---- the machine


@frozen
class Wall:
    """What the driver lets all processes of a cgroup take together of one GPU, whatever programs they are.

    Attributes:
        limit: Bytes.
        used: Bytes that they hold.
        cgroup: The cgroup that has the limit: "/sys/fs/cgroup/user.slice/user-1001.slice".
        cgroup_id: Its number in the kernel, which is the same in every container. 0: unknown.
        card_total: Bytes that CUDA can give of the whole card. None: unknown.
        chain: The numbers of the process's own cgroup and of all that it can see above.
    """

    limit: int
    used: int
    cgroup: str
    cgroup_id: int = 0
    card_total: int | None = None
    chain: tuple[int, ...] = ()

    @property
    def origin(self) -> Origin:
        """What stands for it where a file's key would."""
        return Origin("machine", self.cgroup, ("hard_limit",))


@frozen
class Device:
    """One GPU as NVML shows it, or one MIG instance of it. Of a GPU that is split only the instances can be used.

    Attributes:
        index: As `nvidia-smi` counts (PCI order). An instance has the index of its GPU.
        uuid: "GPU-…" or "MIG-…".
        name: Product name.
        total: Memory in bytes that CUDA can give, and reports. An instance has its own. Where this process's own cgroup
            has a limit, it is that. None: NVML does not say.
        instance: Number of the MIG instance on its GPU. None: the whole GPU.
        parent: UUID of the GPU that an instance belongs to.
        reserved: Memory in bytes that the driver keeps for itself, beside `total`. None: NVML does not tell it apart,
            and it is part of `total`.
        wall: The limit of a cgroup that this process is in. None: there is none.
    """

    index: int
    uuid: str
    name: str
    total: int | None
    instance: int | None = None
    parent: str | None = None
    reserved: int | None = None
    wall: Wall | None = None

    @property
    def card_total(self) -> int | None:
        """Memory in bytes that CUDA can give of the whole card, whatever the limits of cgroups. None: unknown."""
        return self.total if self.wall is None or self.wall.card_total is None else self.wall.card_total

    @property
    def label(self) -> str:
        """The name for people: "0", and "0:1" for an instance."""
        return str(self.index) if self.instance is None else f"{self.index}:{self.instance}"


@frozen
class Inventory:
    """The machine's GPUs.

    Attributes:
        devices: The GPUs that answer. None: nobody looked, or NVML could not say.
        problem: Why NVML could not say. None: it could, or nobody looked.
        no_driver: NVML could not say, and there is no NVIDIA driver here, so that CUDA shows no GPU either.
        lost: GPUs that do not answer, by index, with the reason.
        named: UUIDs of tokens of CUDA_VISIBLE_DEVICES, as CUDA tells them once it is open.
        totals: Memory in bytes by the digits of a UUID, as CUDA tells it once it is open.
    """

    devices: tuple[Device, ...] | None = None
    problem: str | None = None
    no_driver: bool = False
    lost: Mapping[int, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    totals: Mapping[str, int] = field(default_factory=dict)

    def find_cuda_total(self, token: str, device: Device | None) -> int | None:
        """Return the memory of a card in bytes, where CUDA has to tell it. None: NVML does, or neither."""
        if device is not None and device.total is not None:
            return None
        uuid = device.uuid if device is not None else self.named.get(token, "")
        return self.totals.get(get_uuid_digits(uuid))


def get_uuid_digits(uuid: str) -> str:
    """Return a UUID as hex digits, without "GPU-" or "MIG-": CUDA's own have no prefix."""
    return uuid.partition("-")[2].replace("-", "").lower()


@frozen
class Share:
    """The part of each granted GPU that a launcher gave to this process.

    Attributes:
        giver: Who gave it: "Ray", "Slurm", "MPS".
        text: What was given, as its giver says it: "num_gpus=0.25", "3 shards".
        fraction: The part of a GPU, in 0..1. With `shards`, the part of them.
        shards: The shards that Slurm gave on this node. None: it is not given in shards.
        gpus: How many GPUs the shards are of.
    """

    giver: str
    text: str
    fraction: float = 1.0
    shards: int | None = None
    gpus: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether it is all of each GPU."""
        return self.shards is None and self.fraction == 1

    def measure(self, shards_per_gpu: int | None) -> float | None:
        """Return the part of each GPU, in 0..1. Of shards of several GPUs it is the fewest that each can hold.

        Args:
            shards_per_gpu: How many shards a GPU has. None: unknown.

        Returns:
            None: it is given in shards, and nobody says how many a GPU has.
        """
        if self.shards is None:
            return self.fraction
        if shards_per_gpu is None:
            return None
        certain = max(self.shards - (self.gpus - 1) * shards_per_gpu, 1)
        return min(certain / shards_per_gpu, 1.0) * self.fraction


@frozen
class Grant:
    """What the launcher, a scheduler or the parent process, gave: the outermost ceiling.

    Attributes:
        tokens: CUDA_VISIBLE_DEVICES split at commas, verbatim. None: it was unset, which grants all GPUs.
        pci_order: CUDA counts as nvidia-smi does (CUDA_DEVICE_ORDER=PCI_BUS_ID).
        scheduler: The process runs inside a scheduler's job (for `require_grant`).
        rank: Local rank among the processes of one job on this host. None: there is no such job.
        launcher: Who gave the GPUs: "Slurm", "Ray". "": nobody, or a plain parent process.
        listed: The GPUs of the job as the scheduler's own variables list them, whatever CUDA_VISIBLE_DEVICES says.
            () is none. None: they do not say.
        unlisted: The scheduler lists the GPUs that it gives, and has listed none.
        mounted: The scheduler gives GPUs by mounting their devices: what is there was given.
        handed: The list that a parent process under a policy wrote for this process, of which the request is made.
            None: it wrote none.
        own_gpus: The launcher gave each rank GPUs of its own.
        share: The part of each GPU that was given. None: nothing tells it.
        job: What tells this job and program from others, by the names of the audit record's `job`: "scheduler",
            "id", "array_id", "array_task", "step", "rank", "partition", "user", "name", "ray_job", "actor", "task",
            "notebook", "hub_user", "pod", "namespace". Empty outside of a job.
    """

    tokens: tuple[str, ...] | None = None
    pci_order: bool = False
    scheduler: bool = False
    rank: int | None = None
    launcher: str = ""
    listed: tuple[str, ...] | None = None
    unlisted: bool = False
    mounted: bool = False
    handed: tuple[str, ...] | None = None
    own_gpus: bool = False
    share: Share | None = None
    job: Mapping[str, str] = field(default_factory=dict)


# ---- a GPU that several processes want

#: Less memory than this without a lease goes unnoticed: a display's server and the driver take some.
UNNOTICED_BYTES = 256 << 20


@frozen
class Allocation:
    """A process's part of one GPU.

    Attributes:
        uuid: The GPU, by its token where its UUID is not known.
        limit: Bytes the process may take of it. None: the whole card.
        shared: The GPU has too little free memory for it, and the process went on all the same.
    """

    uuid: str
    limit: int | None = None
    shared: bool = False


@frozen
class Lease:
    """A live process's claim to an allocation.

    Attributes:
        id: The id of the process's leases. A process has one lease per GPU, all under one id.
        allocation: Which GPU, and how much of it.
        uid: The user of the process that holds it, as the kernel says.
        user: Name of the owner, or "uid:1234" without a passwd entry.
        pid: The holder's process id, as the kernel counts here. 0: it is a process of another container.
        script: The program's file. None: `-c`, a notebook or an interactive session.
        since: When it was taken, in seconds since the epoch.
        parent: The id of the lease of an ancestor whose GPU it shares. None: it shares none.
        overhead: Bytes of each GPU that the process takes beside what the allocation says.
        cgroups: The numbers of the cgroups that the process is in. (): the driver limits none of them.
    """

    id: str
    allocation: Allocation
    uid: int
    user: str
    pid: int
    script: str | None = None
    since: float = 0.0
    parent: str | None = None
    overhead: int = 0
    cgroups: tuple[int, ...] = ()


@frozen
class MemoryUse:
    """How much of a GPU's memory is in use, and by whom, as NVML says.

    Attributes:
        used: Bytes in use, without what the driver reserves.
        by_pid: Bytes of each process. None: the driver hides processes, or their memory.
        walled: Bytes in use in the cgroup whose limit holds for this process. 0 where none does.
    """

    used: int
    by_pid: Mapping[int, int] | None = None
    walled: int = 0


# ---- what is to be done, and what was


@frozen
class PlanInputs:
    """What a Plan is made from.

    Attributes:
        policy: The merged policy.
        grant: What the scheduler or the parent gave.
        inventory: The machine's GPUs.
        request: Tokens the program itself wrote into CUDA_VISIBLE_DEVICES after it started. None: it wrote none.
        allocations: The process's parts of GPUs it shares with others. None: not decided yet, or not needed.
    """

    policy: EffectivePolicy
    grant: Grant
    inventory: Inventory
    request: Sequence[str] | None = None
    allocations: Sequence[Allocation] | None = None

    @property
    def choice(self) -> Setting | None:
        """The value of `visible_devices`. None: no file sets it."""
        return self.policy.settings.get("visible_devices")


@frozen
class PlannedDevice:
    """One GPU the process may use.

    Attributes:
        token: Its entry for CUDA_VISIBLE_DEVICES.
        device: What NVML says of it. None: it is not known which GPU it is.
        limit: The tightest limit on it. None: unlimited.
        logical_devices: The sizes of the logical GPUs it is split into. Together they fit the limit.
        limited_by: The keys that set `limit`: one, or a size's and a share's where only the card can tell which holds.
        user_total: What all processes of the user may take of it together. None: there is no such ceiling.
        cuda_total: Its memory in bytes, where CUDA had to tell it. None: NVML does, or neither.
        asked: What a file of a user or project asked for, if that is more than `limit`. None: no file did.
    """

    token: str
    device: Device | None = None
    limit: MemoryLimit | None = None
    logical_devices: tuple[MemoryLimit, ...] = ()
    limited_by: tuple[Origin, ...] = ()
    user_total: MemoryLimit | None = None
    cuda_total: int | None = None
    asked: MemoryLimit | None = None

    @property
    def identity(self) -> str:
        """What names the card: its UUID, or its token where that is not known. "" is any card."""
        return self.device.uuid if self.device is not None else self.token

    @property
    def total(self) -> int | None:
        """Its memory in bytes, as NVML says or else CUDA. None: unknown."""
        return self.device.total if self.device is not None and self.device.total is not None else self.cuda_total

    @property
    def card_total(self) -> int | None:
        """The memory of the whole card in bytes, also where CUDA reports the limit of a cgroup. None: unknown."""
        return self.total if self.device is None or self.device.card_total is None else self.device.card_total

    def describe(
        self,
        index: int,
        total: int | None,
        *,
        limit: int | None,
        fraction: float | None,
        logical_devices: tuple[int, ...] = (),
    ) -> DeviceOutcome:
        """Describe what the card was given at an entry point.

        Args:
            index, limit, fraction, logical_devices: As in `DeviceOutcome`.
            total: Its memory in bytes, where the framework had to tell it, too. None: unknown.
        """
        wish = self.asked
        return DeviceOutcome(
            index=index,
            token=self.token,
            uuid=self.device.uuid if self.device is not None else None,
            name=self.device.name if self.device is not None else None,
            limit=limit,
            fraction=fraction,
            logical_devices=logical_devices,
            total=total if total is not None else self.total,
            asked=None if wish is None else total if wish.unlimited else wish.on(total),
            asked_fraction=None if wish is None else 1.0 if wish.unlimited else wish.fraction,
        )


@frozen
class Plan:
    """What to apply to this process.

    Attributes:
        visible: New value of CUDA_VISIBLE_DEVICES. None: leave it alone.
        pci_order: Also set CUDA_DEVICE_ORDER=PCI_BUS_ID.
        devices: The GPUs in CUDA's order. None: all that CUDA shows, whatever they are.
        limit: The tightest limit on a GPU that `devices` does not name. None: unlimited.
        growth: True: memory grows on demand, whatever the program asks. False or None: the program decides.
        allocator: The framework's GPU allocator. None: the program decides.
        findings: What was clamped, and what could not be planned.
        machine_count: How many GPUs the machine has. None: unknown.
        limited_by: The keys that set `limit`.
        grown_by: The key that sets `growth`. None: no key does.
        allocated_by: The keys that set `allocator`: its own, or the limits that imply it.
        choosing: How tfenv still chooses among `devices`. None: the process gets all of them.
        asked: What a file of a user or project asked for, if that is more than `limit`. None: no file did.
        share: What "granted" means, in a policy that says so. None: it does not, or nothing tells the share.
    """

    visible: str | None = None
    pci_order: bool = False
    devices: tuple[PlannedDevice, ...] | None = None
    limit: MemoryLimit | None = None
    growth: bool | None = None
    allocator: Allocator | None = None
    findings: tuple[Finding, ...] = ()
    machine_count: int | None = None
    limited_by: tuple[Origin, ...] = ()
    grown_by: Origin | None = None
    allocated_by: tuple[Origin, ...] = ()
    choosing: AutoChoice | None = None
    asked: MemoryLimit | None = None
    share: Share | None = None

    def find_device(self, ordinal: int) -> PlannedDevice:
        """Return the card at a place in CUDA's order. One that the plan does not name has the limit of all such."""
        if self.devices is not None and ordinal < len(self.devices):
            return self.devices[ordinal]
        return PlannedDevice(token="", limit=self.limit, limited_by=self.limited_by, asked=self.asked)

    @property
    def takes_leases(self) -> bool:
        """Whether this process agrees with others on who takes how much of which GPU."""
        return self.choosing is not None or any(device.user_total is not None for device in self.devices or ())

    @property
    def limits(self) -> tuple[Origin, ...]:
        """The keys that limit the memory of any GPU. (): none is limited."""
        found = [origin for device in self.devices or () for origin in device.limited_by]
        return tuple(dict.fromkeys([*found, *self.limited_by]))


@frozen
class Choice:
    """What this process has of the GPUs it shares with others.

    Attributes:
        allocations: One per GPU. () where none was free and the process goes without.
        lease: The id of its leases. None: nobody else can see them.
        waited_s: Seconds it waited for them.
    """

    allocations: tuple[Allocation, ...] = ()
    lease: str | None = None
    waited_s: float = 0.0


OutcomeStatus = Literal["applied", "clamped", "too_late", "degraded", "cpu", "failed"]


@frozen
class DeviceOutcome:
    """What one GPU was given at an entry point.

    Attributes:
        index: As the framework counts: GPU:0, GPU:1, …
        token: Its entry in CUDA_VISIBLE_DEVICES. "": unknown.
        uuid: None: NVML could not say.
        name: Product name. None: unknown.
        limit: Bytes the allocator may take. None: unlimited.
        fraction: The limit as a fraction of the total, where no bytes are known.
        logical_devices: Sizes in bytes of the logical GPUs it was split into. (): it was not split.
        asked: Bytes that a file of a user or project asked for, if that is more than the limit. None: no file did.
        asked_fraction: The same as a fraction of the total, where it was written so.
        total: The card's memory in bytes. None: unknown.
    """

    index: int
    token: str = ""
    uuid: str | None = None
    name: str | None = None
    limit: int | None = None
    fraction: float | None = None
    logical_devices: tuple[int, ...] = ()
    asked: int | None = None
    asked_fraction: float | None = None
    total: int | None = None

    @property
    def memory_limit(self) -> MemoryLimit:
        """The limit as one value: the bytes, or where they are not known the fraction."""
        return MemoryLimit(bytes=self.limit, fraction=self.fraction if self.limit is None else None)

    @property
    def identity(self) -> str:
        """What names the card, as `PlannedDevice.identity`."""
        return self.uuid or self.token


@frozen
class Outcome:
    """What happened at one entry point.

    Attributes:
        status: What became of the policy, in one word.
        entry_point: The entry point that was passed: "TFE_ContextOptionsSetConfig". "": none was.
        devices: What each GPU was given.
        growth: Whether memory grows on demand there.
        asked: What the program asked for, in the framework's own terms. {}: it asked for nothing.
        given: What the framework was given instead, in the same terms.
        findings: What was clamped, and what could not be applied.
        choice: The GPUs that were chosen for it. None: nothing was to be chosen.
        would_clamp: What the process would lose under the observed policy.
    """

    status: OutcomeStatus
    entry_point: str = ""
    devices: tuple[DeviceOutcome, ...] = ()
    growth: bool | None = None
    asked: Mapping[str, object] = field(default_factory=dict)
    given: Mapping[str, object] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    choice: Choice | None = None
    would_clamp: tuple[WouldClamp, ...] = ()
