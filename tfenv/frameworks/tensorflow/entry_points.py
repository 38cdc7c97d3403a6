"""TensorFlow's entry points: the few functions through which Python asks C++ for devices.

Each entry point is replaced, right after TensorFlow's own code ran and before the program gets the module, by a
function that clamps the ConfigProto on its way. Nothing here opens CUDA before TensorFlow does.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import wraps
from types import ModuleType
from typing import Any, Protocol

from tfenv.errors import PROGRAM, Finding, PolicyError
from tfenv.frameworks.tensorflow.config_proto import ClampResult, View, clamp, make_view
from tfenv.policy.clamps import report_program_clamp
from tfenv.policy.model import Origin, Outcome, OutcomeStatus, Plan, PlannedDevice, format_origins
from tfenv.policy.units import MIB

__all__ = ["ENTRY_POINTS", "PolicyCallbacks", "apply_environment", "fall_back", "initialised", "install", "version"]

#: The entry points, as (module that Python code looks the name up in, name).
ENTRY_POINTS = (
    ("tensorflow.python.pywrap_tfe", "TF_ListPhysicalDevices"),
    ("tensorflow.python.pywrap_tfe", "TFE_ContextOptionsSetConfig"),
    ("tensorflow.python.client.pywrap_tf_session", "TF_NewSessionOptions"),
    ("tensorflow.python.client._pywrap_device_lib", "list_devices"),
    ("tensorflow.python.client.pywrap_tf_session", "TF_NewServer"),
    ("tensorflow.python.grappler._pywrap_tf_cluster", "TF_NewCluster"),
)

#: They open CUDA too, and create no device: only visibility has to be settled before.
OPENERS = (
    ("tensorflow.python.profiler.internal._pywrap_profiler", "ProfilerSession"),
    ("tensorflow.python.profiler.internal._pywrap_profiler", "start_server"),
)

#: They make the eager context a server, which creates its devices anew from the ServerDef's own ConfigProto.
CLUSTER_ENTRY_POINTS = tuple(
    ("tensorflow.python.pywrap_tfe", name)
    for name in (
        "TFE_EnableCollectiveOps",
        "TFE_ContextSetServerDef",
        "TFE_ContextSetServerDefWithTimeout",
        "TFE_ContextSetServerDefWithTimeoutAndRetries",
        "TFE_ContextUpdateServerDef",
        "TFE_ContextUpdateServerDefWithTimeout",
    )
)

Function = Callable[..., Any]


class PolicyCallbacks(Protocol):
    """What an entry point asks of the policy."""

    def before_listing(self) -> None:
        """The first listing of this process is next, just before cuInit: the last moment for visibility."""
        ...

    def identify(self, ordinals: Sequence[int]) -> Mapping[int, PlannedDevice] | None:
        """Which GPU of the plan each is that TensorFlow lists; those left out are not allowed. None: not known.

        Raises PolicyError if some are not the plan's and `on_error = "fail"`.
        """
        ...

    def shown(self) -> int | None:
        """How many GPUs CUDA shows, those TensorFlow ignores too; None when unknown."""
        ...

    def plan(self) -> Plan:
        """What this process may use, as decided at the first listing."""
        ...

    def cpu_only(self) -> bool:
        """Whether the policy failed and `on_error = "cpu"` says no GPU may be created."""
        ...

    def report(self, outcome: Outcome) -> None:
        """Write down what happened at an entry point."""
        ...

    def failed(self, error: Exception, entry_point: str) -> None:
        """A fault of ours at an entry point; raises PolicyError if `on_error = "fail"`."""
        ...


# ---- the environment variables TensorFlow reads by itself

_UNIFIED = "TF_FORCE_UNIFIED_MEMORY"
_GROWTH = "TF_FORCE_GPU_ALLOW_GROWTH"
_ALLOCATOR = "TF_GPU_ALLOCATOR"
_MIN_SYSTEM_MEMORY = "TF_DEVICE_MIN_SYS_MEMORY_IN_MB"


def apply_environment(plan: Plan, environ: MutableMapping[str, str]) -> list[Finding]:
    """Clear the variables that would defeat the plan, set the allocator it asks for.

    Args:
        plan: What this process may use.
        environ: Changed in place; TensorFlow reads it when it creates an allocator.

    Returns:
        A note for each variable of the program that was cleared.
    """
    notes: list[Finding] = []
    limited = plan.limit is not None or any(device.limit is not None for device in plan.devices or ())
    if plan.growth and environ.get(_GROWTH) == "false":
        by = () if plan.grown_by is None else (plan.grown_by,)
        notes.append(_cleared(environ, _GROWTH, "memory growth is on", by))
    if plan.allocator == "bfc" and environ.get(_ALLOCATOR, "") not in ("", "bfc"):
        why = "the policy's allocator is bfc, the one that keeps a limit"
        notes.append(_cleared(environ, _ALLOCATOR, why, plan.allocated_by))
    elif plan.allocator not in (None, "bfc"):
        environ[_ALLOCATOR] = str(plan.allocator)
    if limited and _XLA_DEVICES.search(environ.get(_XLA_FLAGS, "")):
        notes.append(_without_xla_devices(environ, plan.limits))
    if limited:
        notes += [_cleared(environ, name, why, plan.limits) for name, why in _DEFEATS_A_LIMIT if name in environ]
    return notes


_XLA_FLAGS = "TF_XLA_FLAGS"
#: The deprecated XLA_GPU devices have an allocator of their own, which no ConfigProto limits.
_XLA_DEVICES = re.compile(r"--?tf_xla_enable_xla_devices(?:=(?:true|1|t|yes))?(?![\w=-])", re.IGNORECASE)


def _without_xla_devices(environ: MutableMapping[str, str], by: Sequence[Origin]) -> Finding:
    environ[_XLA_FLAGS] = _XLA_DEVICES.sub("", environ[_XLA_FLAGS]).strip()
    text = f"{PROGRAM}'s {_XLA_FLAGS} asked for XLA_GPU devices: memory is limited, they know no limit"
    return report_program_clamp(f"{text}{_says(by)}", by)


_DEFEATS_A_LIMIT = (
    (_UNIFIED, "memory is limited, managed memory knows no limit"),
    (_MIN_SYSTEM_MEMORY, "memory is limited, it would override a percentage"),
)


def _cleared(environ: MutableMapping[str, str], name: str, why: str, by: Sequence[Origin]) -> Finding:
    text = f"{PROGRAM}'s {name}={environ.pop(name)} was cleared: {why}"
    return report_program_clamp(f"{text}{_says(by)}", by)


def _says(by: Sequence[Origin]) -> str:
    return f", as {format_origins(by)} says" if by else ""


# ---- the entry points


class EntryPointWrappers:
    """TensorFlow's original functions, and what stands in their place."""

    def __init__(self, governor: PolicyCallbacks) -> None:
        self.governor = governor
        self.missing: tuple[str, ...] = ()
        self.lock = threading.RLock()
        self.listed_by = 0  # pid; a forked child lists anew
        self.clustered_by = 0
        self.list_physical: Function = list
        self.list_local: Function = list
        self.config_class: Any = None
        self.server_class: Any = None

    # -- listing

    def enter(self) -> None:
        self.lock.acquire()

    def leave(self) -> None:
        self.lock.release()

    def renew_lock(self) -> None:
        """In a forked child nobody may be left who could release the parent's lock."""
        self.lock = threading.RLock()

    def before_listing(self) -> None:
        with self.lock:
            if self.listed_by == os.getpid():
                return
            # A PolicyError leaves it unlisted: the next try meets the policy again.
            self.guarded("TF_ListPhysicalDevices", self.governor.before_listing)
            self.listed_by = os.getpid()

    def guarded(self, entry_point: str, action: Callable[[], object]) -> None:
        """Run ours; a fault of ours is the program's trouble only if the policy asks for that."""
        try:
            action()
        except PolicyError:
            raise
        except Exception as error:
            if _is_the_programs(error):
                raise
            self.governor.failed(error, entry_point)

    def view(self) -> View:
        """The policy on the GPUs TensorFlow can use. Lists devices, so call it only where it is about to."""
        self.before_listing()
        ordinals = self.ordinals()
        planned = self.governor.identify(ordinals)
        governor = self.governor
        return make_view(governor.plan(), ordinals, planned, cpu_only=governor.cpu_only(), shown=governor.shown())

    def ordinals(self) -> list[int]:
        """The GPUs TensorFlow can use, as CUDA counts."""
        names = [name.decode() for name in self.list_physical()]
        return [int(name.rpartition(":")[2]) for name in names if ":GPU:" in name]

    # -- creating

    def clamped(self, data: bytes, entry_point: str) -> bytes:
        """The bytes of a ConfigProto, clamped; untouched where no GPU is asked for."""
        with self.lock:
            result: list[bytes] = []
            self.guarded(entry_point, lambda: result.append(self.clamp_bytes(data, entry_point)))
            return result[0] if result else self.after_fault(data)

    def clamp_bytes(self, data: bytes, entry_point: str) -> bytes:
        config = self.config_class.FromString(data)
        if config.device_count.get("GPU") == 0:
            self.governor.report(self.without_gpu(entry_point))
            return data
        view = self.view()
        notes = apply_environment(self.governor.plan(), os.environ)
        clamped = clamp(config, view)
        self.governor.report(_outcome(clamped, notes, view, entry_point))
        return data if clamped.config is None else bytes(clamped.config.SerializeToString())

    def without_gpu(self, entry_point: str) -> Outcome:
        """How programs say "CPU only", and how eager execution says that there is no GPU. CUDA stays as it is."""
        if self.listed_by == os.getpid() and not self.ordinals():
            return Outcome("applied", entry_point, findings=(NO_GPU,))
        return Outcome("applied", entry_point, asked={"device_count": 0}, given={"device_count": 0})

    def after_fault(self, data: bytes) -> bytes:
        """A fault of ours: the program's own configuration, or no GPU where the policy says so."""
        if not self.governor.cpu_only():
            return data
        config = self.config_class.FromString(data)
        config.device_count["GPU"] = 0
        return bytes(config.SerializeToString())

    # -- one function an entry point

    def wrap_list_physical_devices(self, original: Function) -> Function:
        self.list_physical = original

        @wraps(original)
        def list_physical_devices() -> Any:
            self.before_listing()
            return original()

        return list_physical_devices

    def wrap_opener(self, original: Function) -> Function:
        @wraps(original)
        def opener(*args: Any, **kwargs: Any) -> Any:
            self.before_listing()
            return original(*args, **kwargs)

        return opener

    def wrap_context_options(self, original: Function) -> Function:
        @wraps(original)
        def set_config(options: Any, config: bytes) -> Any:
            return original(options, self.clamped(config, "TFE_ContextOptionsSetConfig"))

        return set_config

    def wrap_session_options(self, original: Function) -> Function:
        @wraps(original)
        def new_session_options(target: Any = None, config: Any = None) -> Any:
            if _is_remote(target):
                # A remote session opens no device here; its server passed the entry point TF_NewServer.
                return original(target=target, config=config)
            data = config.SerializeToString() if config is not None else b""
            clamped = self.clamped(data, "TF_NewSessionOptions")
            return original(target=target, config=config if clamped == data else self.config_class.FromString(clamped))

        return new_session_options

    def wrap_list_devices(self, original: Function) -> Function:
        self.list_local = original

        @wraps(original)
        def list_devices(config: bytes | None = None) -> Any:
            data = config or b""
            clamped = self.clamped(data, "list_devices")
            return original(config if clamped == data else clamped)

        return list_devices

    def wrap_new_server(self, original: Function) -> Function:
        @wraps(original)
        def new_server(server_def: bytes) -> Any:
            return original(self.clamped_server(server_def, "TF_NewServer"))

        return new_server

    def wrap_server_def(self, original: Function) -> Function:
        """Of the calls that make the eager context a member of a cluster: (context, …, serialized ServerDef, …)."""

        @wraps(original)
        def with_server_def(*args: Any, **kwargs: Any) -> Any:
            entry_point = original.__name__
            clamped = [self.clamped_server(arg, entry_point) if isinstance(arg, bytes) else arg for arg in args]
            return original(*clamped, **kwargs)

        return with_server_def

    def clamped_server(self, server_def: bytes, entry_point: str) -> bytes:
        message = self.server_class.FromString(server_def)
        data = message.default_session_config.SerializeToString()
        message.default_session_config.ParseFromString(self.clamped(data, entry_point))
        return bytes(message.SerializeToString())

    def wrap_new_cluster(self, original: Function) -> Function:
        @wraps(original)
        def new_cluster(*args: Any, **kwargs: Any) -> Any:
            self.create_allocators()
            return original(*args, **kwargs)

        return new_cluster

    def create_allocators(self) -> None:
        """Grappler makes a session in C++ with no ConfigProto: have limited allocators exist before it does."""
        with self.lock:
            if self.clustered_by == os.getpid():
                return
            self.clustered_by = os.getpid()
            self.guarded("TF_NewCluster", self.list_limited)

    def list_limited(self) -> None:
        try:
            self.list_local(self.clamped(b"", "TF_NewCluster"))
        except PolicyError:
            raise
        except Exception:  # noqa: BLE001
            # The devices exist already with another split (AlreadyExistsError): their allocators are
            # limited, and grappler's own session fails on the same conflict before it makes new ones.
            return


#: Where an error of ours can come from; anything else that runs in an entry point is a signal handler of the program's.
_OURS = {"tfenv", "google", "tensorflow", "tomli", "structlog", "jsonschema", "pynvml", *sys.stdlib_module_names}


def _is_the_programs(error: BaseException) -> bool:
    """Whether an exception was raised by the program itself: by the handler of a signal that came meanwhile."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = str(traceback.tb_frame.f_globals.get("__name__", "")) if traceback is not None else "tfenv"
    return module.partition(".")[0] not in _OURS - {"__main__"}


def _is_remote(target: Any) -> bool:
    text = target.decode(errors="replace") if isinstance(target, bytes) else str(target or "")
    return text not in ("", "local")


#: TensorFlow has nothing to create: whoever reports it knows why.
NO_GPU = Finding("no-gpu", "TensorFlow lists no GPU", "warning")


def _outcome(clamped: ClampResult, notes: list[Finding], view: View, entry_point: str) -> Outcome:
    findings = (*notes, *clamped.findings)
    if not view.gpus and not view.cpu_only:
        findings += (NO_GPU,)
    status: OutcomeStatus = "clamped" if any(f.code == "clamped" for f in findings) else "applied"
    if view.cpu_only:
        status = "cpu"
    growth = bool(clamped.config.gpu_options.allow_growth) if clamped.config is not None else None
    return Outcome(status, entry_point, clamped.devices, growth, clamped.asked, clamped.given, findings)


# ---- installing

_WRAPPERS: dict[str, Callable[[EntryPointWrappers, Function], Function]] = {
    "TF_ListPhysicalDevices": EntryPointWrappers.wrap_list_physical_devices,
    "TFE_ContextOptionsSetConfig": EntryPointWrappers.wrap_context_options,
    "TF_NewSessionOptions": EntryPointWrappers.wrap_session_options,
    "list_devices": EntryPointWrappers.wrap_list_devices,
    "TF_NewServer": EntryPointWrappers.wrap_new_server,
    "TF_NewCluster": EntryPointWrappers.wrap_new_cluster,
}

_installed: EntryPointWrappers | None = None


def install(governor: PolicyCallbacks) -> tuple[str, ...]:
    """Put the governor at every entry point of the TensorFlow that is loaded; a second call only changes the governor.

    Returns:
        The entry points that are not where they should be (a TensorFlow this release does not know).
    """
    global _installed  # noqa: PLW0603 - TensorFlow's own entry points are global
    if _installed is not None:
        _installed.governor = governor
        _installed.listed_by = 0
        return _installed.missing
    wrappers = EntryPointWrappers(governor)
    try:
        from tensorflow.core.protobuf import config_pb2, tensorflow_server_pb2
    except ImportError:
        return tuple(name for _, name in ENTRY_POINTS)
    wrappers.config_class = config_pb2.ConfigProto
    wrappers.server_class = tensorflow_server_pb2.ServerDef
    missing = [name for _, name in ENTRY_POINTS if not _entry_point_exists(name)]
    if {"TF_ListPhysicalDevices", "list_devices"} & set(missing):
        return tuple(missing)
    for module_name, name in ENTRY_POINTS:
        if name not in missing:
            _replace(sys.modules[module_name], name, _WRAPPERS[name], wrappers)
    for module_name, name in (*OPENERS, *CLUSTER_ENTRY_POINTS):
        module = sys.modules.get(module_name)
        if module is not None and hasattr(module, name):
            wrap = (
                EntryPointWrappers.wrap_opener if (module_name, name) in OPENERS else EntryPointWrappers.wrap_server_def
            )
            _replace(module, name, wrap, wrappers)
    wrappers.missing = tuple(missing)
    # A fork waits for an entry point to be left: the child would inherit the locks of modules imported there.
    os.register_at_fork(before=wrappers.enter, after_in_parent=wrappers.leave, after_in_child=wrappers.renew_lock)
    _installed = wrappers
    return wrappers.missing


def _entry_point_exists(name: str) -> bool:
    module_name = next(module for module, entry_point in ENTRY_POINTS if entry_point == name)
    return callable(getattr(sys.modules.get(module_name), name, None))


def _replace(
    module: ModuleType,
    name: str,
    wrap: Callable[[EntryPointWrappers, Function], Function],
    wrappers: EntryPointWrappers,
) -> None:
    """Replace a function in the module, and in the extension module it was copied from."""
    original = getattr(module, name)
    replacement = wrap(wrappers, original)
    parent, _, leaf = module.__name__.rpartition(".")
    for holder in (module, sys.modules.get(f"{parent}._{leaf}")):
        if holder is not None and getattr(holder, name, None) is original:
            setattr(holder, name, replacement)


# ---- a TensorFlow whose entry points are elsewhere


def fall_back(governor: PolicyCallbacks) -> None:
    """Apply what the public API can: growth, or a limit without it, at the first listing of devices.

    Nothing is listed here, so that a program can still fork after it imported TensorFlow.
    """
    if governor.plan().growth:
        os.environ[_GROWTH] = "true"
    context_class = getattr(sys.modules.get("tensorflow.python.eager.context"), "Context", None)
    original = getattr(context_class, "_initialize_physical_devices", None)
    if context_class is None or original is None:
        return

    @wraps(original)
    def initialize_physical_devices(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = getattr(self, "_physical_devices", None) is None
        if first:
            governor.before_listing()
        result = original(self, *args, **kwargs)
        if first:
            _limit_by_public_calls(governor)
        return result

    context_class._initialize_physical_devices = initialize_physical_devices  # noqa: SLF001 - there is no public one


def _limit_by_public_calls(governor: PolicyCallbacks) -> None:
    config = sys.modules["tensorflow"].config
    gpus = config.list_physical_devices("GPU")
    view = make_view(governor.plan(), range(len(gpus)))
    for gpu, device in zip(view.gpus, gpus, strict=True):
        limit = gpu.limit if gpu.binding else None
        if limit is not None:
            logical = config.LogicalDeviceConfiguration(memory_limit=limit // MIB)
            config.set_logical_device_configuration(device, [logical])
    governor.report(Outcome("degraded", "tf.config", findings=()))


# ---- what state TensorFlow is in


def version() -> str | None:
    """The loaded TensorFlow's version."""
    return getattr(sys.modules.get("tensorflow"), "__version__", None)


def initialised() -> bool:
    """Whether TensorFlow has created its devices, too late for any policy."""
    module = sys.modules.get("tensorflow.python.eager.context")
    context = getattr(module, "_context", None)
    return getattr(context, "_context_handle", None) is not None
