"""TensorFlow's entry points: the few functions through which Python asks C++ for devices.

Each is replaced right after TensorFlow's own code ran and before the program gets the module. The replacement clamps
the ConfigProto on its way. Nothing here opens CUDA before TensorFlow does.
"""

from __future__ import annotations

import os
import sys
from functools import wraps

from tfenv.errors import PolicyError
from tfenv.frameworks.guard import EntryPointGuard, watch_function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

    from tfenv.errors import Finding
    from tfenv.frameworks.base import PolicyCallbacks
    from tfenv.frameworks.tensorflow.config_proto import ClampResult, Ledger, PolicyView
    from tfenv.policy.model import Outcome

    Function = Callable[..., Any]

#: The one that opens CUDA.
FIRST_LISTING = "TF_ListPhysicalDevices"

#: The entry points, as (module that Python code looks the name up in, name).
ENTRY_POINTS = (
    ("tensorflow.python.pywrap_tfe", FIRST_LISTING),
    ("tensorflow.python.pywrap_tfe", "TFE_ContextOptionsSetConfig"),
    ("tensorflow.python.client.pywrap_tf_session", "TF_NewSessionOptions"),
    ("tensorflow.python.client._pywrap_device_lib", "list_devices"),
    ("tensorflow.python.client.pywrap_tf_session", "TF_NewServer"),
    ("tensorflow.python.grappler._pywrap_tf_cluster", "TF_NewCluster"),
)

#: They open CUDA too, and create no device. Only visibility has to be settled before.
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

#: Methods of the eager context that nearly all use of devices that exist goes through.
_USES = ("ensure_initialized", "_initialize_physical_devices")


class EntryPointWrappers(EntryPointGuard):
    """TensorFlow's original functions, and what takes their place.

    Attributes:
        missing: Entry points that this TensorFlow does not have.
        ledger: What the entry points promised so far. A forked child inherits TensorFlow's allocators, and with them
            this. None: nothing yet.
    """

    def __init__(self, policy: PolicyCallbacks) -> None:
        super().__init__(policy, FIRST_LISTING)
        self.missing: tuple[str, ...] = ()
        self.clustered_by = 0
        self.ledger: Ledger | None = None
        self.list_physical: Function = list
        self.list_local: Function = list
        self.config_class: Any = None
        self.server_class: Any = None

    # -- listing

    def list_ordinals(self) -> list[int]:
        """Return the GPUs that TensorFlow can use, as CUDA counts. This opens CUDA."""
        names = [name.decode() for name in self.list_physical()]
        return [int(name.rpartition(":")[2]) for name in names if ":GPU:" in name]

    def make_view(self) -> PolicyView:
        """Return the policy on the GPUs that TensorFlow can use. This opens CUDA, so TensorFlow must be about to."""
        from tfenv.frameworks.tensorflow.config_proto import make_view

        self.before_listing()
        ordinals = self.list_ordinals()
        planned = self.policy.identify_devices(ordinals)
        shown = self.policy.count_shown_devices()
        return make_view(self.policy.get_plan(), ordinals, planned, cpu_only=self.policy.is_cpu_only(), shown=shown)

    # -- creating

    def clamp_config(self, data: bytes, entry_point: str) -> bytes:
        """Clamp the bytes of a ConfigProto. They stay as they are where no GPU is asked for."""
        with self.lock:
            result: list[bytes] = []
            self.run_guarded(entry_point, lambda: result.append(self._clamp_bytes(data, entry_point)))
            return result[0] if result else self._fall_back(data)

    def _clamp_bytes(self, data: bytes, entry_point: str) -> bytes:
        config = self.config_class.FromString(data)
        if config.device_count.get("GPU") == 0:
            self.policy.report(self._describe_no_gpu(entry_point))
            return data
        from tfenv.frameworks.tensorflow.config_proto import clamp
        from tfenv.frameworks.tensorflow.environment import prepare_environment

        view = self.make_view()
        notes = prepare_environment(self.policy.get_plan(), os.environ)
        result = clamp(config, view, self.ledger)
        # Before the report, which may raise: what is promised too often is only less than could be given.
        self.ledger = result.ledger
        self.policy.report(_make_outcome(result, notes, view, entry_point))
        return data if result.config is None else bytes(result.config.SerializeToString())

    def _describe_no_gpu(self, entry_point: str) -> Outcome:
        """Describe a message without GPUs: programs say "CPU only" so, and eager execution that there is no GPU."""
        from tfenv.policy.model import Outcome

        if self.listed_by == os.getpid() and not self.list_ordinals():
            return Outcome("applied", entry_point, findings=(_make_no_gpu_finding(),))
        return Outcome("applied", entry_point, asked={"device_count": 0}, given={"device_count": 0})

    def _fall_back(self, data: bytes) -> bytes:
        """Return what TensorFlow gets after a fault of ours: the program's bytes, or no GPU if the policy says so."""
        if not self.policy.is_cpu_only():
            return data
        config = self.config_class.FromString(data)
        config.device_count["GPU"] = 0
        return bytes(config.SerializeToString())

    def clamp_server(self, server_def: bytes, entry_point: str) -> bytes:
        """Clamp the ConfigProto inside the bytes of a ServerDef."""
        message = self.server_class.FromString(server_def)
        data = message.default_session_config.SerializeToString()
        message.default_session_config.ParseFromString(self.clamp_config(data, entry_point))
        return bytes(message.SerializeToString())

    # -- one function an entry point

    def wrap_list_physical_devices(self, original: Function) -> Function:
        """Wrap TF_ListPhysicalDevices."""
        self.list_physical = original
        return self.wrap_opener(original)

    def wrap_opener(self, original: Function) -> Function:
        """Wrap a function that opens CUDA and creates no device."""

        @wraps(original)
        def open_devices(*args: Any, **kwargs: Any) -> Any:
            self.before_listing()
            return original(*args, **kwargs)

        return open_devices

    def wrap_context_options(self, original: Function) -> Function:
        """Wrap TFE_ContextOptionsSetConfig."""

        @wraps(original)
        def set_config(options: Any, config: bytes) -> Any:
            return original(options, self.clamp_config(config, "TFE_ContextOptionsSetConfig"))

        return set_config

    def wrap_session_options(self, original: Function) -> Function:
        """Wrap TF_NewSessionOptions."""

        @wraps(original)
        def new_session_options(target: Any = None, config: Any = None) -> Any:
            if _is_remote(target):
                # A remote session opens no device here. Its server passed TF_NewServer.
                return original(target=target, config=config)
            data = config.SerializeToString() if config is not None else b""
            clamped = self.clamp_config(data, "TF_NewSessionOptions")
            return original(target=target, config=config if clamped == data else self.config_class.FromString(clamped))

        return new_session_options

    def wrap_list_devices(self, original: Function) -> Function:
        """Wrap list_devices."""
        self.list_local = original

        @wraps(original)
        def list_devices(config: bytes | None = None) -> Any:
            data = config or b""
            clamped = self.clamp_config(data, "list_devices")
            return original(config if clamped == data else clamped)

        return list_devices

    def wrap_server_def(self, original: Function) -> Function:
        """Wrap a function that takes the bytes of a ServerDef, which is its only argument of bytes."""
        name = original.__name__

        @wraps(original)
        def use_server_def(*args: Any, **kwargs: Any) -> Any:
            clamped = [self.clamp_server(arg, name) if isinstance(arg, bytes) else arg for arg in args]
            return original(*clamped, **kwargs)

        return use_server_def

    def wrap_new_cluster(self, original: Function) -> Function:
        """Wrap grappler's TF_NewCluster, which makes a session in C++ without a ConfigProto."""

        @wraps(original)
        def new_cluster(*args: Any, **kwargs: Any) -> Any:
            self.create_allocators()
            return original(*args, **kwargs)

        return new_cluster

    def create_allocators(self) -> None:
        """Have limited allocators exist before grappler's session makes its own, once per process."""
        with self.lock:
            if self.clustered_by == os.getpid():
                return
            self.clustered_by = os.getpid()
            self.run_guarded("TF_NewCluster", self._list_limited)

    def _list_limited(self) -> None:
        try:
            self.list_local(self.clamp_config(b"", "TF_NewCluster"))
        except PolicyError:
            raise
        except Exception:  # noqa: BLE001
            # The devices exist already with another split (AlreadyExistsError): their allocators are
            # limited, and grappler's own session fails on the same conflict before it makes new ones.
            return


def _is_remote(target: Any) -> bool:
    text = target.decode(errors="replace") if isinstance(target, bytes) else str(target or "")
    return text not in ("", "local")


def _make_no_gpu_finding() -> Finding:
    """Return the finding that TensorFlow has nothing to create. Whoever reports it knows why."""
    from tfenv.errors import Finding

    return Finding("no-gpu", "TensorFlow lists no GPU", "warning")


def _make_outcome(result: ClampResult, notes: list[Finding], view: PolicyView, entry_point: str) -> Outcome:
    from tfenv.policy.model import Outcome

    findings = (*notes, *result.findings)
    if not view.gpus and not view.cpu_only:
        findings += (_make_no_gpu_finding(),)
    clamped = any(finding.code == "clamped" for finding in findings)
    status = "cpu" if view.cpu_only else "clamped" if clamped else "applied"
    growth = bool(result.config.gpu_options.allow_growth) if result.config is not None else None
    return Outcome(status, entry_point, result.devices, growth, result.asked, result.given, findings)  # type: ignore[arg-type]


# ---- intercepting

_WRAPPERS: dict[str, Callable[[EntryPointWrappers, Function], Function]] = {
    FIRST_LISTING: EntryPointWrappers.wrap_list_physical_devices,
    "TFE_ContextOptionsSetConfig": EntryPointWrappers.wrap_context_options,
    "TF_NewSessionOptions": EntryPointWrappers.wrap_session_options,
    "list_devices": EntryPointWrappers.wrap_list_devices,
    "TF_NewServer": EntryPointWrappers.wrap_server_def,
    "TF_NewCluster": EntryPointWrappers.wrap_new_cluster,
}

_installed: EntryPointWrappers | None = None


def intercept(policy: PolicyCallbacks) -> tuple[str, ...]:
    """Wrap every entry point of the TensorFlow that is loaded. A second call only changes the policy.

    Returns:
        The entry points that are not where they should be, in a TensorFlow that this release does not know.
    """
    global _installed  # noqa: PLW0603 - TensorFlow's own entry points are global
    if _installed is not None:
        _installed.policy = policy
        _installed.listed_by = 0
        return _installed.missing
    wrappers = EntryPointWrappers(policy)
    try:
        from tensorflow.core.protobuf import config_pb2, tensorflow_server_pb2
    except ImportError:
        return tuple(name for _, name in ENTRY_POINTS)
    wrappers.config_class = config_pb2.ConfigProto
    wrappers.server_class = tensorflow_server_pb2.ServerDef
    wrappers.missing = tuple(name for module, name in ENTRY_POINTS if not _has_entry_point(module, name))
    if not {FIRST_LISTING, "list_devices"} & set(wrappers.missing):
        _replace_all(wrappers)
        # A fork waits for an entry point to be left: the child would inherit the locks of modules imported there.
        wrappers.follow_forks()
        _installed = wrappers
    return wrappers.missing


def watch_use(policy: PolicyCallbacks) -> None:
    """Ask a policy from now on whenever eager execution uses its devices or lists them. A second call does nothing."""
    context = getattr(sys.modules.get("tensorflow.python.eager.context"), "Context", None)
    for name in _USES:
        watch_function(context, name, policy)


def _has_entry_point(module_name: str, name: str) -> bool:
    return callable(getattr(sys.modules.get(module_name), name, None))


def _replace_all(wrappers: EntryPointWrappers) -> None:
    wraps_by_name = [(place, _WRAPPERS[place[1]]) for place in ENTRY_POINTS if place[1] not in wrappers.missing]
    wraps_by_name += [(place, EntryPointWrappers.wrap_opener) for place in OPENERS if _has_entry_point(*place)]
    wraps_by_name += [
        (place, EntryPointWrappers.wrap_server_def) for place in CLUSTER_ENTRY_POINTS if _has_entry_point(*place)
    ]
    for (module_name, name), wrap in wraps_by_name:
        module = sys.modules[module_name]
        _replace(module, name, wrap(wrappers, getattr(module, name)))


def _replace(module: ModuleType, name: str, replacement: Function) -> None:
    """Replace a function in the module, and in the extension module it was copied from."""
    original = getattr(module, name)
    parent, _, leaf = module.__name__.rpartition(".")
    for holder in (module, sys.modules.get(f"{parent}._{leaf}")):
        if holder is not None and getattr(holder, name, None) is original:
            setattr(holder, name, replacement)
