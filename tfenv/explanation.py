"""What a policy means for a process that would start here: each value, who set it, and its effect.

It is to a policy what `git config --show-origin` is to git. Nothing of it needs a framework or a GPU.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Literal

from tfenv.audit.sinks import list_log_names
from tfenv.config.discover import find_hidden_file, find_search_end, locate_named_file
from tfenv.config.document import Trust, read
from tfenv.config.hidden import advise_on_hidden
from tfenv.config.presence import FILE_NAME, MACHINE_ROOT, PYPROJECT
from tfenv.config.schema import validate
from tfenv.devices import nvml
from tfenv.devices.cgroups import get_user_slice, read_support
from tfenv.devices.inventory import read_inventory
from tfenv.devices.memory import read_memory
from tfenv.errors import Finding
from tfenv.frameworks.registry import get_framework, list_frameworks
from tfenv.identity import UserAccount, call_as, find_account, find_user, identify, suggest_name
from tfenv.launchers.grant import read_current_grant
from tfenv.pipeline import LoadedPolicy, check_disable_switch, current_start, decide, load
from tfenv.policy.budget import get_framework_shares
from tfenv.policy.merge import apply_observed, contains_project, select_dated, select_tables
from tfenv.policy.model import (
    LAYER_ORDER,
    Grant,
    Inventory,
    LayerName,
    MemoryLimit,
    OnError,
    Origin,
    Plan,
    PlannedDevice,
    Setting,
    Source,
    Start,
    format_key,
)
from tfenv.policy.supports import drop_unsupported
from tfenv.sharing.lease import read_program
from tfenv.sharing.occupancy import describe_occupancy
from tfenv.sharing.queue import Unavailable, look
from tfenv.sharing.request import request_from_plan
from tfenv.values import as_dict, field, frozen, replace

#: The scene of a choice that cannot be foreseen.
UNKNOWN_OCCUPANCY = "tfenv cannot tell which GPUs are free without NVML"


@frozen
class ExplainedValue:
    """One value as its author wrote it.

    Attributes:
        key: Dotted, inside its file: "gpu.memory_limit", "user.alice.gpu.memory_limit".
        value: As TOML has it.
        layer: Whose file it is.
        path: The file, or "<tfgpu run>" for options on a command line.
        line: 1-based. None when unknown.
        column: 1-based, in characters. None when unknown.
        expires: The day from which its table does not count, as "2027-01-31". None: it has no end.
        reason: Why its table exists. "": nobody says.
    """

    key: str
    value: object
    layer: LayerName
    path: str
    line: int | None = None
    column: int | None = None
    expires: str | None = None
    reason: str = ""


@frozen
class ExplainedCeiling(ExplainedValue):
    """A ceiling that holds here.

    Attributes:
        replaces: What less specific tables of the same layer say, the most specific first. This is an exception from
            them.
    """

    replaces: tuple[ExplainedValue, ...] = ()


@frozen
class ExplainedSetting:
    """A setting that holds here.

    Attributes:
        name: "memory_limit".
        chosen: The nearest layer's value.
        overrides: Values that lost, nearest first: of less specific tables of the same layer, then of other layers.
        clamps: What a ceiling made of it.
    """

    name: str
    chosen: ExplainedValue
    overrides: tuple[ExplainedValue, ...] = ()
    clamps: tuple[Finding, ...] = ()


@frozen
class ExplainedException:
    """A table for this user, one of the groups or the project that has an end or a reason.

    Attributes:
        table: Dotted, inside its file: "user.alice".
        path: The file.
        line: 1-based. None when unknown.
        expires: The day from which it does not count, as "2027-01-31". None: it has no end.
        reason: Why it exists. "": nobody says.
        expired: That day has come.
        text: All of this in words: "expires on 2027-01-31 (thesis)".
    """

    table: str
    path: str
    line: int | None = None
    expires: str | None = None
    reason: str = ""
    expired: bool = False
    text: str = ""


@frozen
class ExplainedObserved:
    """What would follow if the tables under `[observe]` were in force. Nothing of it is applied.

    Attributes:
        settings: The settings that would be others, with their origins.
        ceilings: The ceilings that would be others.
        plan: What would be applied when a framework is imported.
        refused: The import of a framework would raise PolicyError.
        tell: The line on stderr says what the process would lose.
        findings: What would be wrong, with positions, beside what is wrong now.
    """

    settings: tuple[ExplainedSetting, ...] = ()
    ceilings: tuple[ExplainedCeiling, ...] = ()
    plan: Plan = field(default_factory=Plan)
    refused: bool = False
    tell: bool = False
    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return all of it as values that JSON knows."""
        return {
            **as_dict(self),
            "settings": {setting.name: _setting_as_dict(setting) for setting in self.settings},
            "plan": plan_as_dict(self.plan),
        }


@frozen
class ExaminedFile:
    """A place that was looked at.

    Attributes:
        layer: Whose files stand there.
        path: A file, or for "none" the place where one would stand.
        state: "read", "dropped" as a whole, "hidden" by a nearer file of the layer, "replaced" by the file that
            TFGPU_CONFIG names, or "none" there.
        why: The reason, where it does not count. What was looked for, where there is none.
    """

    layer: LayerName
    path: str
    state: Literal["read", "dropped", "hidden", "replaced", "none"]
    why: str = ""


@frozen
class ExplainedChoice:
    """GPUs that would be chosen when the program first lists its devices.

    Attributes:
        count: How many.
        when_busy: What follows when there are fewer free ones.
        now: Those that would be taken now, as the plan names them. None: there are not enough, or nobody can tell.
        scene: Who is on the GPUs, in words, or why nobody can tell.
    """

    count: int
    when_busy: str
    now: tuple[str, ...] | None = None
    scene: str = ""


@frozen
class Explanation:
    """The policy of a process that would start now.

    Attributes:
        user: Name of the effective user.
        groups: Names of the user's groups.
        project: The project's directory: that of its file, or the start directory.
        new_login: It is for a new login of another user. The variables of this process do not count.
        files: Every place that was looked at, the machine's first.
        settings: The settings that apply, with their origins.
        ceilings: The ceilings that apply. All of them hold together.
        on_error: What tfenv does if it cannot apply something. It is the strictest value of all layers.
        logs: Files that the audit records go to, as configured.
        disabled: TFGPU_DISABLE switches the policy off.
        refused: The import of a framework raises PolicyError, because there is an error and `on_error = "fail"`.
        grant: What the scheduler or the parent process gave.
        inventory: The machine's GPUs as NVML shows them, or why it cannot.
        plan: What is applied when a framework is imported.
        wall_problem: Why the driver keeps no limit here, though the machine's files have `memory_total`. "": it does,
            or they have none.
        choosing: The choice among the plan's GPUs. None if all of them are used.
        exceptions: The tables for this subject that have an end or a reason, the expired ones too.
        observed: What would follow from the tables under `[observe]`. None: there are none.
        findings: What is wrong, with positions. Clamps are notes.
    """

    user: str
    groups: tuple[str, ...]
    project: str | None
    new_login: bool = False
    files: tuple[ExaminedFile, ...] = ()
    settings: tuple[ExplainedSetting, ...] = ()
    ceilings: tuple[ExplainedCeiling, ...] = ()
    on_error: OnError = "warn"
    logs: tuple[str, ...] = ()
    disabled: bool = False
    refused: bool = False
    grant: Grant = field(default_factory=Grant)
    inventory: Inventory = field(default_factory=Inventory)
    plan: Plan = field(default_factory=Plan)
    wall_problem: str = ""
    choosing: ExplainedChoice | None = None
    exceptions: tuple[ExplainedException, ...] = ()
    observed: ExplainedObserved | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def silent(self) -> bool:
        """Whether nothing about GPUs is declared, so that programs are left as they are."""
        return not self.settings and not self.ceilings

    def as_dict(self) -> dict[str, object]:
        """Return all of it as values that JSON knows. Sizes are in bytes, fractions in 0..1."""
        return {
            **as_dict(self),
            "settings": {setting.name: _setting_as_dict(setting) for setting in self.settings},
            "inventory": {"devices": as_dict(self.inventory.devices), "problem": self.inventory.problem},
            "plan": plan_as_dict(self.plan),
            "observed": None if self.observed is None else self.observed.as_dict(),
        }


def _setting_as_dict(setting: ExplainedSetting) -> dict[str, object]:
    clamps = [finding.message for finding in setting.clamps]
    return {**as_dict(setting.chosen), "overrides": as_dict(setting.overrides), "clamped": clamps}


def plan_as_dict(plan: Plan) -> dict[str, object]:
    """Return a Plan as values that JSON knows. `devices` is None where it means all that CUDA shows."""
    devices = None if plan.devices is None else [_planned_as_dict(planned) for planned in plan.devices]
    return {
        "cuda_visible_devices": plan.visible,
        "pci_order": plan.pci_order,
        "devices": devices,
        **_limit_as_dict(plan.limit),
        "growth": plan.growth,
        "allocator": plan.allocator,
        "share": as_dict(plan.share),
    }


def _planned_as_dict(planned: PlannedDevice) -> dict[str, object]:
    device = planned.device
    return {
        "token": planned.token,
        "index": device.index if device else None,
        "uuid": device.uuid if device else None,
        "name": device.name if device else None,
        "total_bytes": device.total if device else None,
        **_limit_as_dict(planned.limit),
        "wall": None if device is None or device.wall is None else device.wall.as_dict(),
        "logical_devices": [_limit_as_dict(size) for size in planned.logical_devices],
    }


def _limit_as_dict(limit: MemoryLimit | None) -> dict[str, object]:
    return {"limit_bytes": limit.bytes if limit else None, "limit_fraction": limit.fraction if limit else None}


# ---- making one


def explain(project: str | os.PathLike[str] | None = None, user: str | None = None) -> Explanation:
    """Explain the policy of a process that would start now.

    Args:
        project: The directory it would start in. None: the working directory.
        user: Whose process: a login name, or "uid:1234". None: one's own. Only root may ask for somebody else. It is
            told as for a new login, since nobody's variables but one's own are known.

    Raises:
        NotADirectoryError: `project` is not a directory.
        LookupError: There is no such user.
        PermissionError: Only root may ask for somebody else.
    """
    if project is not None and not os.path.isdir(project):
        raise NotADirectoryError(f"{os.fspath(project)} is not a directory")
    # As a process that starts there sees it: the kernel knows no links in a working directory.
    cwd = None if project is None else os.path.realpath(project)
    uid = os.geteuid() if user is None else _find_uid(user)
    if uid != os.geteuid():
        return _explain_for_somebody_else(find_account(uid), cwd)
    grant, request = read_current_grant()
    return explain_start(current_start(cwd), grant, request)


def explain_start(start: Start, grant: Grant, request: tuple[str, ...] | None) -> Explanation:
    """Explain the policy of a process that started so.

    Args:
        start: What the process was when it started.
        grant: What the scheduler or the parent process gave it.
        request: What the program wrote into CUDA_VISIBLE_DEVICES by itself. None: nothing.
    """
    return _explain_loaded(load(start), grant, request)


def explain_applied(
    loaded: LoadedPolicy,
    grant: Grant,
    inventory: Inventory,
    plan: Plan,
    findings: tuple[Finding, ...],
    request: tuple[str, ...] | None = None,
) -> Explanation:
    """Explain the policy that a process is under.

    Args:
        loaded: The files as the process read them.
        grant: What the scheduler or the parent process gave it.
        inventory: The machine's GPUs.
        plan: What is applied.
        findings: All that was found so far.
        request: What the program wrote into CUDA_VISIBLE_DEVICES by itself. None: nothing.
    """
    return _make_explanation(loaded, grant, inventory, plan, findings, request)


def _find_uid(user: str) -> int:
    uid = find_user(user)
    if uid is None:
        meant = suggest_name(user, (entry.pw_name for entry in pwd.getpwall()))
        right = f'did you mean "{meant}"?' if meant else "compare the spelling with `getent passwd`, or write uid:1234"
        raise LookupError(f'there is no user "{user}" here; {right}')
    return uid


def _explain_for_somebody_else(account: UserAccount, cwd: str | None) -> Explanation:
    """Explain what would apply to somebody else: their files and permissions, and none of the caller's variables."""
    subject = identify(account.uid, account.groups)
    if os.geteuid() != 0:
        raise PermissionError(f"only root can ask about another user; try `sudo tfgpu explain --user {subject.user}`")
    start = Start(
        cwd=cwd or current_start().cwd,
        uid=account.uid,
        home=account.home,
        config_home=f"{account.home}/.config" if account.home else None,
    )
    _import_readers()
    try:
        loaded, may_enter = call_as(account, lambda: (load(start, subject), _may_enter(start.cwd)))
    except OSError as error:
        raise PermissionError(f"cannot read with the permissions of {subject.user}: {error}") from error
    obstacle = None if may_enter else f"{subject.user} cannot enter this directory"
    explanation = _explain_loaded(loaded, Grant(), None, obstacle, get_user_slice(account.uid))
    return replace(explanation, new_login=True)


def _may_enter(directory: str | None) -> bool:
    return directory is None or os.access(directory, os.X_OK, effective_ids=True)


def _import_readers() -> None:
    """Import all that reading takes, while it can be read: tfenv may stand where only root can look."""
    validate(read(Source("run", "", text='gpu = {memory_groth = true, memory_limit = "8 gigs"}'), Trust(0)))


def _explain_loaded(
    loaded: LoadedPolicy,
    grant: Grant,
    request: tuple[str, ...] | None,
    obstacle: str | None = None,
    cgroup: str | None = None,
) -> Explanation:
    """Return what follows from the files.

    Args:
        loaded: The files.
        grant: What the scheduler or the parent process gave.
        request: What the program wrote into CUDA_VISIBLE_DEVICES by itself. None: nothing.
        obstacle: Why no file of the project can be found. None: it can.
        cgroup: The cgroup whose limits count. None: that of this process.
    """
    inventory = read_inventory(cgroup)
    decision = decide(loaded, grant, inventory, request)
    plan = replace(decision.plan, findings=tuple(loaded.locate(finding) for finding in decision.plan.findings))
    disabled, remarks = check_disable_switch(loaded)
    hidden = () if obstacle else advise_on_hidden(loaded.start, loaded.layers)
    unsupported = tuple(_find_unsupported(loaded, plan))
    findings = (*loaded.findings, *remarks, *plan.findings, *unsupported, *hidden)
    made = _make_explanation(loaded, grant, inventory, plan, findings, request, obstacle)
    return replace(made, disabled=disabled, refused=decision.refused and not disabled)


def _find_unsupported(loaded: LoadedPolicy, plan: Plan) -> Iterator[Finding]:
    """Yield what frameworks cannot keep: those that the policy names, and as a note those that are installed here."""
    named = get_framework_shares(loaded.policy)
    for name in list_frameworks():
        framework = get_framework(name)
        if name not in named and find_spec(name) is None:
            continue
        kept = drop_unsupported(plan, loaded.policy, framework.supports, framework.title)
        for finding in kept.findings[len(plan.findings) :]:
            yield loaded.locate(finding if name in named else replace(finding, severity="note"))


def _make_explanation(
    loaded: LoadedPolicy,
    grant: Grant,
    inventory: Inventory,
    plan: Plan,
    findings: tuple[Finding, ...],
    request: tuple[str, ...] | None,
    obstacle: str | None = None,
) -> Explanation:
    return Explanation(
        user=loaded.subject.user,
        groups=loaded.subject.groups,
        project=loaded.subject.project,
        files=tuple(_list_files(loaded, obstacle or _find_project_ban(loaded))),
        settings=tuple(_explain_settings(loaded, plan)),
        ceilings=tuple(_explain_ceilings(loaded)),
        on_error=loaded.policy.on_error,
        logs=list_log_names(loaded.policy.audit),
        grant=grant,
        inventory=inventory,
        plan=plan,
        wall_problem=_find_wall_problem(loaded, inventory),
        choosing=_explain_choice(plan, loaded.subject.uid, loaded.policy.process_overhead),
        exceptions=tuple(_explain_exceptions(loaded)),
        observed=_explain_observed(loaded, grant, inventory, request, plan),
        findings=tuple(map(loaded.locate, findings)),
    )


def _find_wall_problem(loaded: LoadedPolicy, inventory: Inventory) -> str:
    """Return why the driver does not keep the machine's `memory_total`. "": it does, or there is none."""
    has_total = any(ceiling.origin.layer == "machine" for ceiling in loaded.policy.list_ceilings("memory_total"))
    if not has_total or not inventory.devices or any(device.wall is not None for device in inventory.devices):
        return ""
    try:
        with nvml.open_nvml() as pynvml:
            support = read_support(pynvml)
    except nvml.NvmlUnavailableError as error:
        return str(error)
    if support.backend == "none":
        return support.problem
    if all(device.instance is not None for device in inventory.devices):
        return "the driver keeps no limits for MIG instances"
    return "the driver could keep it, but no cgroup here has a limit; root can run `tfgpu wall apply`"


def _explain_exceptions(loaded: LoadedPolicy) -> Iterator[ExplainedException]:
    for dated in loaded.dated:
        _, position = loaded.find_value(dated.origin)
        yield ExplainedException(
            format_key(dated.origin.key),
            dated.origin.path,
            position and position[0],
            dated.expires,
            dated.reason,
            dated.expired,
            dated.describe_end(),
        )


def _explain_observed(
    loaded: LoadedPolicy, grant: Grant, inventory: Inventory, request: tuple[str, ...] | None, in_force: Plan
) -> ExplainedObserved | None:
    """Return what would follow if the tables under `[observe]` were in force, beside the plan that is."""
    if loaded.observed is None:
        return None
    observed = [layer.observed for layer in loaded.layers if layer.observed is not None]
    tried = replace(
        loaded,
        policy=loaded.observed.policy,
        layers=tuple(map(apply_observed, loaded.layers)),
        dated=tuple(select_dated(observed, loaded.subject)),
    )
    decision = decide(tried, grant, inventory, request)
    found = tuple(map(loaded.locate, decision.plan.findings))
    now = tuple(map(loaded.locate, in_force.findings))
    known = loaded.policy.origins
    settings = {name: value for name, value in tried.policy.settings.items() if value.origin not in known}
    ceilings = tuple(ceiling for ceiling in tried.policy.ceilings if ceiling.origin not in known)
    shown = replace(tried, policy=replace(tried.policy, settings=settings, ceilings=ceilings))
    plan = replace(decision.plan, findings=found)
    return ExplainedObserved(
        settings=tuple(_explain_settings(shown, plan)),
        ceilings=tuple(_explain_ceilings(shown)),
        plan=plan,
        refused=decision.refused,
        tell=loaded.observed.tell,
        findings=tuple(finding for finding in found if finding not in now),
    )


def _explain_choice(plan: Plan, uid: int, overhead: int) -> ExplainedChoice | None:
    """Return what an automatic choice would take now, without taking it. Nobody waits."""
    if plan.choosing is None:
        return None
    made = ExplainedChoice(plan.choosing.count, plan.choosing.when_busy)
    gpu_request = request_from_plan(plan, uid, overhead=overhead)
    if gpu_request is None:
        return replace(made, scene=UNKNOWN_OCCUPANCY)
    names = {device.device.uuid: device.token for device in plan.devices or () if device.device is not None}
    found = look(gpu_request, lambda: read_memory(names))
    if isinstance(found, Unavailable):
        return replace(made, scene=describe_occupancy(found.occupancy, names, read_program))
    return replace(made, now=tuple(names[allocation.uuid] for allocation in found))


# ---- values


def _explain_settings(loaded: LoadedPolicy, plan: Plan) -> Iterable[ExplainedSetting]:
    for name, setting in loaded.policy.settings.items():
        others = loaded.policy.overridden.get(name, ())
        lost = [
            loser for winner in (setting, *others) for loser in (winner, *_list_replaced(loaded, "gpu", name, winner))
        ][1:]
        yield ExplainedSetting(
            name=name,
            chosen=_explain_value(loaded, setting.origin),
            overrides=tuple(_explain_value(loaded, loser.origin) for loser in lost),
            clamps=tuple(finding for finding in plan.findings if _is_about(finding, setting.origin)),
        )


def _explain_ceilings(loaded: LoadedPolicy) -> Iterable[ExplainedCeiling]:
    for ceiling in loaded.policy.ceilings:
        lost = _list_replaced(loaded, "ceiling", ceiling.key, Setting(ceiling.value, ceiling.origin))
        replaces = tuple(_explain_value(loaded, loser.origin) for loser in lost)
        yield ExplainedCeiling(**vars(_explain_value(loaded, ceiling.origin)), replaces=replaces)


def _list_replaced(loaded: LoadedPolicy, kind: Literal["gpu", "ceiling"], name: str, winner: Setting) -> list[Setting]:
    """Return what less specific tables of the winner's own layer say, the most specific first."""
    found: list[tuple[int, int, Setting]] = []
    for layer in loaded.layers:
        if layer.name == winner.origin.layer:
            ranked = enumerate(select_tables(layer, loaded.subject))
            tables = [(rank, table.gpu if kind == "gpu" else table.ceiling) for rank, table in ranked]
            found += [(rank, len(found), table[name]) for rank, table in tables if name in table]
    ordered = [setting for _, _, setting in sorted(found, key=lambda entry: entry[:2], reverse=True)]
    return [setting for setting in ordered if setting.origin != winner.origin]


def _is_about(finding: Finding, origin: Origin) -> bool:
    """Return whether it says what became of this value, or of an entry of it, as `gpu.device[0]` of `gpu.device`."""
    key = format_key(origin.key)
    same_key = finding.key is not None and (finding.key == key or finding.key.startswith(f"{key}["))
    asked = finding.asked_by == str(origin)  # noted at the ceiling that held, as of max_devices
    return finding.code == "clamped" and (asked or (finding.path == origin.path and same_key))


def _explain_value(loaded: LoadedPolicy, origin: Origin) -> ExplainedValue:
    value, position = loaded.find_value(origin)
    line, column = position or (None, None)
    dated = next((dated for dated in loaded.dated if dated.holds(origin)), None)
    expires, reason = (None, "") if dated is None else (dated.expires, dated.reason)
    return ExplainedValue(format_key(origin.key), value, origin.layer, origin.path, line, column, expires, reason)


# ---- files


def _find_project_ban(loaded: LoadedPolicy) -> str | None:
    """Return why no project's file counts. None if the administrator lets them count."""
    said = [layer.machine["allow_project_files"] for layer in loaded.layers if "allow_project_files" in layer.machine]
    if not said or said[-1].value is not False:
        return None
    return f"project files are ignored: allow_project_files = false in {said[-1].origin.path}"


def _list_files(loaded: LoadedPolicy, obstacle: str | None) -> Iterable[ExaminedFile]:
    """List every place in the order of the layers. For a layer without a file, where one was looked for."""
    seen = [ExaminedFile(document.source.layer, document.source.path, "read") for document in loaded.documents]
    paths = {file.path for file in seen}
    for finding in loaded.findings:
        if finding.path is not None and finding.path not in paths:
            paths.add(finding.path)
            seen.append(
                ExaminedFile(_guess_layer(finding.path, loaded.start), finding.path, "dropped", finding.message)
            )
    for document in loaded.documents:
        if document.source.layer == "project":
            hidden = find_hidden_file(loaded.start, document.source.path)
            if hidden is not None and hidden.path not in paths:
                seen.append(ExaminedFile("project", hidden.path, "hidden", "a nearer project file counts instead"))
    present = {file.layer for file in seen}
    if loaded.replaced is not None:
        seen.append(ExaminedFile("project", loaded.replaced, "replaced", "TFGPU_CONFIG names another file"))
    other = any(_is_on_the_walk(file.path, loaded.start) for file in seen)
    seen += [place for place in _list_places(loaded.start, obstacle, other=other) if place.layer not in present]
    return sorted(seen, key=lambda file: (LAYER_ORDER.index(file.layer), file.state not in ("hidden", "replaced")))


def _is_on_the_walk(path: str, start: Start) -> bool:
    """Return whether the search for a project's file comes upon a file, which may count for another layer already."""
    folder, name = os.path.split(path)
    return name in (FILE_NAME, PYPROJECT) and start.cwd is not None and contains_project(folder, start.cwd)


def _guess_layer(path: str, start: Start) -> LayerName:
    if path.startswith(f"{MACHINE_ROOT}/"):
        return "machine"
    if path in (start.site, locate_named_file(start, "site")):
        return "site"
    if path == _locate_user_file(start):
        return "user"
    return "run" if path == "<tfgpu run>" else "project"


def _locate_user_file(start: Start) -> str:
    return os.path.join(start.config_home or "~/.config", "tfgpu", FILE_NAME)


def _list_places(start: Start, obstacle: str | None, *, other: bool) -> Iterable[ExaminedFile]:
    """List where each layer's file would stand. `other` says that the search for a project's passed one of another."""
    yield ExaminedFile("machine", f"{MACHINE_ROOT}/{FILE_NAME}", "none", "no such file")
    if start.site:
        yield ExaminedFile("site", locate_named_file(start, "site") or start.site, "none", _explain_no_site(start))
    if start.elevated:
        yield ExaminedFile("user", _locate_user_file(start), "none", "not looked for under sudo")
        yield ExaminedFile("project", start.cwd or "", "none", "not looked for under sudo")
        return
    yield ExaminedFile(
        "user", _locate_user_file(start), "none", "no such file" if start.home else "there is no home directory"
    )
    if start.isolated:
        yield ExaminedFile("project", start.cwd or "", "none", "not looked for with python -I or -E")
    elif start.config and obstacle is None:
        yield ExaminedFile("project", start.config, "none", "TFGPU_CONFIG names the file of another layer")
    else:
        yield ExaminedFile("project", start.cwd or "", "none", obstacle or _describe_search(start, other=other))


def _explain_no_site(start: Start) -> str:
    """Say why the file that TFGPU_SITE_CONFIG names does not count as the site's."""
    if start.elevated:
        return "TFGPU_SITE_CONFIG does not count under sudo"
    if start.isolated:
        return "TFGPU_SITE_CONFIG does not count with python -I or -E"
    return "TFGPU_SITE_CONFIG names the file of another layer"


def _describe_search(start: Start, *, other: bool) -> str:
    """Say what was looked for in vain, up to which directory, and why no further."""
    end = find_search_end(start)
    looked_for = f"no {'other ' if other else ''}{FILE_NAME} and no pyproject.toml with [tool.tfgpu]"
    if end is None:
        return f"{looked_for}: this directory cannot be searched"
    top, why = end
    if top == start.cwd:
        return f"{looked_for} here, and the search ends at {why}"
    return f"{looked_for} here or above, up to {top}, {why}"
