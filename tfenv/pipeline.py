"""The line itself: Start -> [Source] -> [Document] -> [Layer] -> EffectivePolicy -> Plan.

It composes config, policy and devices. No other module knows all three.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tfenv.config.discover import VARIABLES, discover
from tfenv.config.document import Document, DocumentError, Trust, read
from tfenv.config.last_good import find_last_good, format_copy_time
from tfenv.config.presence import MACHINE_ROOT, is_isolated, list_program_folders
from tfenv.config.schema import validate
from tfenv.devices.inventory import read_inventory
from tfenv.errors import PROGRAM, Finding
from tfenv.identity import find_home, find_outer_uid, find_user, identify
from tfenv.policy.merge import merge, merge_observed, select_dated
from tfenv.policy.model import (
    Allocation,
    DatedTable,
    EffectivePolicy,
    Grant,
    Inventory,
    KeyPath,
    Layer,
    ObservedPolicy,
    Origin,
    Plan,
    Source,
    Start,
    Subject,
    format_key,
)
from tfenv.policy.resolve import NO_GPU, resolve
from tfenv.policy.visibility import needs_inventory
from tfenv.values import field, frozen, replace

#: Variables that count as they were when the process started.
_REMEMBERED = (
    "TFGPU_CONFIG", "TFGPU_SITE_CONFIG", "TFGPU_RUN", "TFGPU_DISABLE", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "SUDO_UID",
)  # fmt: skip


#: Times that the machine's files are read again, where somebody switches to others meanwhile.
_MOST_SWITCHES = 20
#: Digits of a hash that name a version of the machine's file.
_REVISION_DIGITS = 12


@frozen
class LoadedPolicy:
    """All files that count for a process, merged for one subject.

    Attributes:
        start: The process it was done for.
        subject: For whom.
        documents: What was read.
        layers: What of it is valid.
        policy: The merged policy.
        observed: What the policy would be if the tables under `[observe]` were in force. None: there are none.
        dated: The tables for this subject that have an end or a reason, the expired ones too.
        findings: What was wrong on the way, with positions.
        replaced: The path of the project's file that would count if TFGPU_CONFIG were not set. None: there is none.
    """

    start: Start
    subject: Subject
    documents: tuple[Document, ...] = ()
    layers: tuple[Layer, ...] = ()
    policy: EffectivePolicy = field(default_factory=EffectivePolicy)
    observed: ObservedPolicy | None = None
    dated: tuple[DatedTable, ...] = ()
    findings: tuple[Finding, ...] = ()
    replaced: str | None = None

    @property
    def found(self) -> bool:
        """Whether some file was there, be it a broken one."""
        return bool(self.documents or self.findings)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The files that were read."""
        return tuple(document.source for document in self.documents)

    @property
    def hashes(self) -> Mapping[str, str]:
        """sha256 of each file that was read, by path."""
        return {document.source.path: document.sha256 for document in self.documents}

    @property
    def exceptions(self) -> tuple[DatedTable, ...]:
        """The tables for this subject that have an end or a reason, and count."""
        return tuple(dated for dated in self.dated if not dated.expired)

    @property
    def revision(self) -> str | None:
        """The name of this version of the machine's policy: `[machine] revision`, or the first digits of the sha256.

        None: there is no machine-wide file.
        """
        if self.policy.revision is not None:
            return self.policy.revision
        machine = (d for d in self.documents if d.source.layer == "machine" and d.source.scope is None)
        return next((document.sha256[:_REVISION_DIGITS] for document in machine), None)

    def locate(self, finding: Finding) -> Finding:
        """Return the finding with line and column, if it names a key of one of the documents."""
        document = self._find_document(finding.path)
        if document is None or finding.line is not None or finding.key is None:
            return finding
        key = _find_key_path(document.data, finding.key)
        line, column = (key and document.find_position(key)) or (None, None)
        return replace(finding, line=line, column=column)

    def find_value(self, origin: Origin) -> tuple[object, tuple[int, int] | None]:
        """Return a value as its author wrote it, and its line and column. None stands for what is not known."""
        document = self._find_document(origin.path)
        if document is None:
            return None, None
        value: object = document.data
        for part in origin.key:
            value = value.get(str(part)) if isinstance(value, Mapping) else None
        return value, document.find_position(origin.key)

    def _find_document(self, path: str | None) -> Document | None:
        return next((document for document in self.documents if document.source.path == path), None)


def _find_key_path(data: Mapping[str, object], wanted: str) -> KeyPath | None:
    """Find the path of a dotted key. The tables are walked, since a dot may stand inside a quoted key."""
    stack: list[tuple[KeyPath, object]] = [((), data)]
    while stack:
        path, value = stack.pop()
        if path and format_key(path) == wanted:
            return path
        if isinstance(value, Mapping):
            stack += [((*path, str(name)), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            stack += [((*path, index), inner) for index, inner in enumerate(value)]
    return None


# ---- who and where


def make_start(remembered: Mapping[str, str | None], *, at_import: bool = False) -> Start:
    """Turn what the hook remembered of the process's start into a value.

    Args:
        remembered: By name: the variables of `_REMEMBERED`, "cwd" and "script". None, or no entry: it was not set.
        at_import: A framework is being imported, and its importer counts, too.
    """
    uid = os.geteuid()
    home = find_home(find_outer_uid(uid))
    config_home = remembered.get("XDG_CONFIG_HOME") or ""
    if not config_home.startswith("/"):
        config_home = f"{home}/.config" if home else ""
    elevated = remembered.get("SUDO_UID") is not None or os.getuid() != uid
    state_home = remembered.get("XDG_STATE_HOME") or ""
    return Start(
        cwd=remembered.get("cwd"),
        uid=uid,
        program_folders=tuple(list_program_folders(remembered, at_import=at_import)),
        site=remembered.get("TFGPU_SITE_CONFIG") or None,
        config=remembered.get("TFGPU_CONFIG") or None,
        run=remembered.get("TFGPU_RUN") or None,
        home=home,
        config_home=config_home or None,
        disable=remembered.get("TFGPU_DISABLE") or None,
        disabled_late=at_import and os.environ.get("TFGPU_DISABLE") == "1" != remembered.get("TFGPU_DISABLE"),
        # As for the specification, a relative one is none.
        state_home=state_home if state_home.startswith("/") and not elevated else None,
        elevated=elevated,
        isolated=is_isolated(),
    )


def current_start(cwd: str | None = None) -> Start:
    """Return the start of a process that would begin here and now, for commands and for Python callers.

    Args:
        cwd: Where it would begin. None: in the working directory.
    """
    remembered: dict[str, str | None] = {name: os.environ.get(name) for name in _REMEMBERED}
    try:
        remembered["cwd"] = cwd or os.getcwd()
    except OSError:
        remembered["cwd"] = None
    return make_start(remembered)


# ---- the line


def load(
    start: Start,
    subject: Subject | None = None,
    machine_root: str = MACHINE_ROOT,
    machine_trust: Trust | None = None,
    today: str | None = None,
) -> LoadedPolicy:
    """Find, read, check and merge all files.

    Args:
        start: The process to do it for.
        subject: For whom. None: for this process's own user.
        machine_root: Where the machine layer stands. It is another one only to check or try a policy.
        machine_trust: Whose machine layer counts. None: root's.
        today: The day that tables with an end are compared with, as "2027-01-31". None: the machine's.

    Returns:
        Everything that could be understood, and a finding for each broken file. Never raises for a file's content.
    """
    known = subject or identify(start.uid)
    machine_trust = machine_trust or Trust(uid=start.uid)
    sources, missing, machine = _read_machine(start, known, machine_root, machine_trust, today)
    trust = Trust(uid=start.uid, owners=_find_trusted_owners(machine))
    if trust.owners:  # their files can be looked into
        sources, missing = discover(start, known, machine_root, owners=trust.owners)
    others = _read_others(
        sources,
        trust,
        lambda passed_over: discover(start, known, machine_root, passed_over, trust.owners)[0],
        allow_project=allows_project_files(machine.layers),
        today=today,
    )
    subject = replace(known, project=_find_project(others.documents, start))
    read_files = ReadLayers(
        documents=(*machine.documents, *others.documents),
        layers=(*machine.layers, *others.layers),
        findings=(*missing, *machine.findings, *_name_variable(sources, others.findings)),
    )
    loaded = merge_files(start, subject, read_files)
    return _note_replaced_file(loaded, trust, machine_root) if start.config else loaded


def _read_machine(
    start: Start, subject: Subject, machine_root: str, trust: Trust, today: str | None
) -> tuple[tuple[Source, ...], tuple[Finding, ...], ReadLayers]:
    """Find the files of all layers, and read the machine's: all of one version.

    An administrator switches to another version of the policy by renaming a link over /etc/tfgpu. Where that happened
    meanwhile, everything is found and read again.

    Returns:
        What was found, what is wrong with that, and what the machine's files hold.
    """
    switches = 0
    while True:
        link = _identify_link(machine_root)
        sources, missing = discover(start, subject, machine_root)
        found = [source for source in sources if source.layer == "machine"]
        machine = read_layers(found, trust, use_last_good=True, today=today)
        switches += 1
        if _identify_link(machine_root) == link or switches == _MOST_SWITCHES:
            return sources, missing, machine


def _identify_link(path: str) -> tuple[int, int] | None:
    """Return what tells a symbolic link from one that replaces it. None: it is no link."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_ino, status.st_ctime_ns) if stat.S_ISLNK(status.st_mode) else None


def merge_files(start: Start, subject: Subject, files: ReadLayers) -> LoadedPolicy:
    """Merge files that were read.

    Args:
        start: The process to do it for.
        subject: For whom, and the project.
        files: What the files of all layers hold, the machine's first.
    """
    dated = tuple(select_dated(files.layers, subject))
    return LoadedPolicy(
        start=start,
        subject=subject,
        documents=files.documents,
        layers=files.layers,
        policy=_place_default_log(merge(files.layers, subject), start),
        observed=merge_observed(files.layers, subject),
        dated=dated,
        findings=(*files.findings, *_note_expired(dated)),
    )


def allows_project_files(machine_layers: Iterable[Layer]) -> bool:
    """Return whether the machine layer lets the files of projects count."""
    return _find_machine_value(machine_layers, "allow_project_files") is not False


def _note_expired(dated: Iterable[DatedTable]) -> Iterator[Finding]:
    """Note which tables for this subject do not count any more. They are found in the file only when somebody asks."""
    for table in dated:
        if table.expired:
            message = f"{table.describe_end()}, so this table does not count"
            yield Finding("expired", message, "note", table.origin.path, key=format_key(table.origin.key))


def _note_replaced_file(loaded: LoadedPolicy, trust: Trust, machine_root: str) -> LoadedPolicy:
    """Note at the file that TFGPU_CONFIG names which project's file does not count because of it."""
    if not allows_project_files(loaded.layers):
        return loaded
    # Late: most processes have no TFGPU_CONFIG.
    from tfenv.config.hidden import find_replaced_file

    replaced = find_replaced_file(loaded.start, loaded.subject, trust, machine_root)
    if replaced is None:
        return loaded
    message = f"TFGPU_CONFIG names this file, so the project's {replaced} does not apply"
    named = (source.path for source in loaded.sources if source.layer == "project")
    notes = (Finding("project-replaced", message, "note", path) for path in named)
    return replace(loaded, findings=(*loaded.findings, *notes), replaced=replaced)


def _name_variable(sources: Iterable[Source], findings: Iterable[Finding]) -> Iterator[Finding]:
    """Say which variable names a file, where that file cannot be opened."""
    named = {source.path: VARIABLES[source.layer] for source in sources if source.required}
    for finding in findings:
        if finding.path in named and finding.code in ("not-found", "not-a-file", "unreadable"):
            subject = "" if finding.message.startswith(("there ", "the ", "its ", "no ")) else "it "
            yield replace(finding, message=f"{named[finding.path]} names this file, but {subject}{finding.message}")
        else:
            yield finding


def _place_default_log(policy: EffectivePolicy, start: Start) -> EffectivePolicy:
    if start.state_home is None:
        return policy
    return replace(policy, audit=replace(policy.audit, default_log=f"{start.state_home.rstrip('/')}/tfgpu/audit.jsonl"))


def _read_others(
    sources: Sequence[Source],
    trust: Trust,
    find_again: Callable[[frozenset[str]], Sequence[Source]],
    *,
    allow_project: bool,
    today: str | None,
) -> ReadLayers:
    """Read all layers above the machine's.

    Args:
        sources: The files of all layers.
        trust: Whose files count.
        find_again: Finds the files without these paths. The walk goes on above a stranger's file.
        allow_project: Whether a project's file counts.
        today: As for `load`.
    """
    left_out = {"machine"} if allow_project else {"machine", "project"}
    planted: tuple[Finding, ...] = ()
    while True:
        others = read_layers([source for source in sources if source.layer not in left_out], trust, today=today)
        stopped = _find_planted(sources, others)
        if not stopped:
            return replace(others, findings=(*planted, *others.findings))
        planted += stopped
        sources = find_again(frozenset(finding.path or "" for finding in planted))


def _find_planted(sources: Iterable[Source], others: ReadLayers) -> tuple[Finding, ...]:
    """Return what is wrong with a project file that the walk found and that is a stranger's. There is one at most."""
    walked = {source.path for source in sources if source.layer == "project" and not source.required}
    codes = ("untrusted-owner", "insecure-permissions")
    return tuple(f for f in others.findings if f.code in codes and f.severity == "warning" and f.path in walked)


@frozen
class ReadLayers:
    """What some files hold.

    Attributes:
        documents: Those that could be read.
        layers: What of them is valid, one a document.
        findings: Why the others are left out, and what is wrong in those that were read.
    """

    documents: tuple[Document, ...] = ()
    layers: tuple[Layer, ...] = ()
    findings: tuple[Finding, ...] = ()


def read_layers(
    sources: Iterable[Source], trust: Trust, *, use_last_good: bool = False, today: str | None = None
) -> ReadLayers:
    """Read and validate files. Never raises for what is written in them.

    Args:
        sources: The files.
        trust: Whose files count.
        use_last_good: Of a machine file that is left out the last good copy stays in force.
        today: The day that tables with an end are compared with, as "2027-01-31". None: the machine's.
    """
    documents: list[Document] = []
    layers: list[Layer] = []
    findings: list[Finding] = []
    for source in sources:
        try:
            document = read(source, trust)
        except DocumentError as error:
            kept = _read_last_good(source, trust) if use_last_good else None
            if kept is None:
                findings.append(error.finding)
                continue
            document = kept
            since = format_copy_time(document.source.path)
            text = f"{error.finding.message}; the last good copy, of {since}, stays in force"
            findings.append(replace(error.finding, message=text, severity="warning"))
        layer, wrong = validate(document, today)
        documents.append(document)
        layers.append(layer)
        findings.extend(wrong)
    return ReadLayers(tuple(documents), tuple(layers), tuple(findings))


def _read_last_good(source: Source, trust: Trust) -> Document | None:
    copy = find_last_good(source)
    try:
        return None if copy is None else read(copy, trust)
    except DocumentError:
        return None


def _find_machine_value(layers: Iterable[Layer], key: str) -> object:
    values = [layer.machine[key].value for layer in layers if key in layer.machine]
    return values[-1] if values else None


def _find_trusted_owners(machine: ReadLayers) -> frozenset[int]:
    """Find the user ids of the machine layer's `trusted_owners`. A name without an entry trusts nobody."""
    names = _find_machine_value(machine.layers, "trusted_owners")
    owners = (find_user(str(name)) for name in (names if isinstance(names, tuple) else ()))
    return frozenset(uid for uid in owners if uid is not None)


def _find_project(documents: Iterable[Document], start: Start) -> str | None:
    """Return the directory of the project's file. Without such a file, where the process started."""
    for document in documents:
        if document.source.layer == "project":
            return os.path.dirname(document.source.path)
    return start.cwd


def make_plan(
    loaded: LoadedPolicy,
    grant: Grant,
    inventory: Inventory | None = None,
    request: Sequence[str] | None = None,
    ask: Callable[[], Inventory] = read_inventory,
    allocations: Sequence[Allocation] | None = None,
) -> Plan:
    """Resolve the policy for this process.

    Args:
        loaded: The merged policy.
        grant: What was granted.
        inventory: The machine's GPUs. None: NVML is asked only if visibility cannot be decided without.
        request: What the program wrote into CUDA_VISIBLE_DEVICES by itself. None: nothing.
        ask: Who asks NVML.
        allocations: The places the process was given on GPUs it shares. None: not yet, or there is no need.
    """
    if inventory is None:
        needed = needs_inventory(loaded.policy, grant, request)
        inventory = ask() if needed else Inventory()
    plan = resolve(loaded.policy, grant, inventory, request, allocations)
    # Notes stay without a position: they are common, and finding it costs a scan of the file.
    findings = [finding if finding.severity == "note" else loaded.locate(finding) for finding in plan.findings]
    return replace(plan, findings=tuple(findings))


@frozen
class Decision:
    """What follows from a policy for one process.

    Attributes:
        plan: What to apply.
        errors: What keeps the policy from being in force as it is written.
        refused: There are errors and `on_error = "fail"`: the import of a framework, or its
            entry point, raises PolicyError.
        no_gpu: There are errors and `on_error = "cpu"`.
    """

    plan: Plan
    errors: tuple[Finding, ...] = ()
    refused: bool = False
    no_gpu: bool = False


def decide(
    loaded: LoadedPolicy,
    grant: Grant,
    inventory: Inventory | None = None,
    request: Sequence[str] | None = None,
    elsewhere: Iterable[Finding] = (),
    ask: Callable[[], Inventory] = read_inventory,
    allocations: Sequence[Allocation] | None = None,
) -> Decision:
    """Plan, and decide by `on_error` what errors mean.

    Args:
        loaded: The merged policy.
        grant: What was granted.
        inventory: The machine's GPUs. None: NVML is asked only if it must be.
        request: What the program wrote into CUDA_VISIBLE_DEVICES by itself. None: nothing.
        elsewhere: Findings of others that count too (a required log that cannot be written).
        ask: Who asks NVML.
        allocations: The places the process was given on GPUs it shares. None: not yet, or there is no need.
    """
    plan = make_plan(loaded, grant, inventory, request, ask, allocations)
    errors = select_errors((*loaded.findings, *plan.findings, *elsewhere))
    on_error = loaded.policy.on_error if errors else "warn"
    if on_error == "cpu":
        plan = Plan(visible=NO_GPU, devices=(), findings=plan.findings)
    return Decision(plan, errors, refused=on_error == "fail", no_gpu=on_error == "cpu")


def check_disable_switch(loaded: LoadedPolicy) -> tuple[bool, tuple[Finding, ...]]:
    """Return whether TFGPU_DISABLE=1 switches the policy off, and what is to be said of it."""
    start = loaded.start
    wanted = start.disable == "1" or start.disabled_late
    if not wanted and start.disable in (None, "0"):
        return False, ()
    if not wanted:
        text = "TFGPU_DISABLE has no effect: only the value 1 switches the policy off"
    elif start.elevated or start.isolated:
        text = "TFGPU_DISABLE has no effect under sudo, setuid, python -I or -E"
    elif not loaded.policy.allow_disable:
        text = "TFGPU_DISABLE has no effect: the administrator set allow_disable = false"
    elif start.disabled_late:
        text = "TFGPU_DISABLE=1 was set after Python started, so it has no effect; set it before"
        # Only this process can show it, as with everything that a program asks for.
        return False, (Finding("disable-refused", text, "warning", asked_by=PROGRAM),)
    else:
        return True, ()
    return False, (Finding("disable-refused", text, "warning"),)


def select_errors(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return those that keep the policy from being in force, for `on_error` to decide."""
    return tuple(finding for finding in findings if finding.severity == "error")
