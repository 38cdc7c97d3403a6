"""JAX's entry points: one function creates the client that has the GPUs, and a few before it ask whether there are any.

They are replaced right after JAX's own code ran and before the program gets the module. Nothing here opens CUDA before
JAX does.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import wraps

from tfenv.frameworks.guard import EntryPointGuard, watch_function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tfenv.errors import Finding
    from tfenv.frameworks.base import PolicyCallbacks
    from tfenv.frameworks.jax.client_options import ClampResult, ClientView
    from tfenv.policy.model import Plan, PlannedDevice

    Function = Callable[..., Any]

#: It imports the plugins. That of CUDA compares versions there, and so opens CUDA. JAX holds no lock when it calls it.
FIRST_LISTING = "_discover_and_register_pjrt_plugins"
#: It creates the client of a plugin.
CREATE_CLIENT = "get_c_api_client"
#: Where that is, in JAX's own C++. It was called xla_extension before JAX 0.6.
_EXTENSIONS = ("jaxlib._jax", "jaxlib.xla_extension")
_BRIDGE = "jax._src.xla_bridge"
_HARDWARE = "jax._src.hardware_utils"
#: The first JAX whose plugin of CUDA takes a range of fractions.
_FIRST_WITH_RANGES = (0, 12)

_NO_GPU = "the policy gives JAX no GPU in this process; `tfgpu explain` says what the policy is"
_SPENT = (
    "earlier clients of this process may take all of the GPU memory that the policy gives it; JAX gives it back when "
    "nothing refers to their arrays and devices any more"
)


class ClientPromise:
    """What one client may take of each GPU.

    Attributes:
        sizes: As in `ClientView.promised`.
        client: Refers to the client, which gives its memory back when nothing refers to it. None: it is being created.
    """

    def __init__(self, sizes: Mapping[int, float]) -> None:
        self.sizes = sizes
        self.client: Callable[[], object | None] | None = None

    @property
    def holds(self) -> bool:
        """Whether the client is there."""
        return self.client is None or self.client() is not None


class EntryPointWrappers(EntryPointGuard):
    """JAX's original functions, and what takes their place.

    Attributes:
        promises: What the clients of this process may take.
    """

    def __init__(self, policy: PolicyCallbacks) -> None:
        super().__init__(policy, FIRST_LISTING)
        self.promises: list[ClientPromise] = []

    # -- the policy

    def _make_view(self) -> ClientView:
        """Return the policy on the GPUs that CUDA shows. This opens CUDA, so JAX must be about to."""
        from tfenv.frameworks.jax.client_options import ClientView
        from tfenv.frameworks.jax.environment import find_sources

        planned = self.policy.identify_devices()
        shown = self.policy.count_shown_devices()
        plan = self.policy.get_plan()
        return ClientView(
            plan=plan,
            devices=_take_in_order(plan, shown) if planned is None else planned,
            shown=shown,
            promised=self._sum_up_promises(),
            takes_range=_read_version() >= _FIRST_WITH_RANGES,
            sources=find_sources(os.environ, _read_setting("jax_pjrt_client_create_options")),
        )

    def _sum_up_promises(self) -> dict[int, float]:
        """Return what the clients that are still there may take of each GPU."""
        if self.promises:
            import gc

            gc.collect()  # cleared backends leave cycles
        self.promises = [promise for promise in self.promises if promise.holds]
        ordinals = {ordinal for promise in self.promises for ordinal in promise.sizes}
        return {ordinal: sum(p.sizes.get(ordinal, 0) for p in self.promises) for ordinal in ordinals}

    def find_refusal(self) -> str | None:
        """Return why JAX may create no GPU, and record it. None: it may."""
        self.before_listing()
        with self.lock:
            reasons: list[str | None] = []
            self.run_guarded(CREATE_CLIENT, lambda: reasons.append(self._find_refusal()))
            return reasons[0] if reasons else _NO_GPU if self.policy.is_cpu_only() else None

    def _find_refusal(self) -> str | None:
        from tfenv.errors import Finding
        from tfenv.frameworks.jax.client_options import clamp
        from tfenv.policy.model import Outcome

        view = self._make_view()
        findings: tuple[Finding, ...] = ()
        if not self.policy.is_cpu_only():
            if not view.promised or not clamp({}, view).is_spent:
                return None
            findings = (Finding("budget-spent", _SPENT, "warning"),)
        self.policy.report(Outcome("cpu", CREATE_CLIENT, findings=findings))
        return _SPENT if findings else _NO_GPU

    def clamp_options(self, options: Mapping[str, Any]) -> tuple[Mapping[str, Any], ClientPromise]:
        """Return the options that a client is given, and what it may take.

        Raises:
            RuntimeError: It may not be created.
        """
        refusal = self.find_refusal()
        if refusal is not None:
            raise RuntimeError(refusal)
        with self.lock:
            results: list[ClampResult] = []
            self.run_guarded(CREATE_CLIENT, lambda: results.append(self._clamp(options)))
            if (results and results[0].is_spent) or (not results and self.policy.is_cpu_only()):
                raise RuntimeError(_SPENT if results else _NO_GPU)
            promise = ClientPromise(results[0].promises if results else {})
            self.promises.append(promise)
            given = results[0].options if results else None
            return options if given is None else given, promise

    def _clamp(self, options: Mapping[str, Any]) -> ClampResult:
        from tfenv.frameworks.jax.client_options import clamp
        from tfenv.frameworks.jax.environment import prepare_environment
        from tfenv.policy.model import Outcome

        notes = prepare_environment(self.policy.get_plan(), os.environ)
        view = self._make_view()
        result = clamp(options, view)
        if result.options is not None:
            findings = (*notes, *result.findings)
            is_clamped = any(finding.code == "clamped" for finding in findings)
            outcome = Outcome(
                status="clamped" if is_clamped else "applied",
                entry_point=CREATE_CLIENT,
                devices=result.devices,
                growth=result.options.get("preallocate") is False,
                asked=result.asked,
                given=result.given,
                findings=findings,
            )
            self.policy.report(outcome)
        return result

    # -- one function an entry point

    def wrap_discovery(self, original: Function) -> Function:
        """Wrap the function that imports the plugins."""

        @wraps(original)
        def discover_and_register() -> Any:
            bridge = sys.modules[_BRIDGE]
            if getattr(bridge, "_plugins_registered", False) or not can_use_cuda():
                return original()
            self.before_listing()
            result = original()
            if "cuda" not in bridge._backend_factories:  # noqa: SLF001 - there is no public one
                self.run_guarded(FIRST_LISTING, self._report_no_gpu)
            return result

        return discover_and_register

    def _report_no_gpu(self) -> None:
        """Report that the plugin of CUDA found no GPU. JAX falls back to the CPU."""
        from tfenv.errors import Finding
        from tfenv.policy.model import Outcome

        if self.policy.is_cpu_only():
            self.policy.report(Outcome("cpu", FIRST_LISTING))
        else:
            finding = Finding("no-gpu", "JAX finds no GPU", "warning")
            self.policy.report(Outcome("applied", FIRST_LISTING, findings=(finding,)))

    def wrap_gpu_check(self, original: Function) -> Function:
        """Wrap the check without which JAX leaves CUDA out of its backends, and goes on with others."""

        @wraps(original)
        def has_visible_nvidia_gpu() -> bool:
            bridge = sys.modules[_BRIDGE]
            is_there, is_expected = bool(original()), "cuda" in bridge._backend_factories  # noqa: SLF001 - no public one
            # Where the program asks for platforms by their names, JAX raises if one cannot be had.
            if not is_there or not is_expected or _read_setting("jax_platforms"):
                return is_there
            refusal = self.find_refusal()
            if refusal is not None:
                bridge._backend_errors["cuda"] = refusal  # noqa: SLF001 - what JAX raises where CUDA is asked for
            return refusal is None

        return has_visible_nvidia_gpu

    def wrap_create_client(self, original: Function) -> Function:
        """Wrap the function that creates the client of a plugin."""

        @wraps(original)
        def get_c_api_client(platform_name: Any, options: Any = None, *args: Any, **kwargs: Any) -> Any:
            options = {} if options is None else options
            if not isinstance(options, Mapping) or not _is_cuda(platform_name, options):
                return original(platform_name, options, *args, **kwargs)
            given, promise = self.clamp_options(options)
            try:
                client = original(platform_name, given, *args, **kwargs)
            except BaseException:
                self.promises.remove(promise)
                raise
            with suppress(TypeError):  # what cannot be watched counts until the end
                promise.client = weakref.ref(client)
            return client

        return get_c_api_client


def _take_in_order(plan: Plan, shown: int | None) -> dict[int, PlannedDevice]:
    """Return the plan's GPUs by ordinal where they cannot be told apart."""
    count = len(plan.devices or ()) or 1 if shown is None else shown
    return {ordinal: plan.find_device(ordinal) for ordinal in range(count)}


def _read_version() -> tuple[int, ...]:
    numbers = str(getattr(sys.modules.get("jaxlib"), "__version__", "0")).split(".")
    return tuple(int(number) for number in numbers[:2] if number.isdecimal())


def _is_cuda(platform: object, options: Mapping[str, Any]) -> bool:
    """Return whether a plugin is that of CUDA. A program may load it under another name."""
    from tfenv.frameworks.jax.environment import find_library

    names = (platform, options.get("platform_name"))
    return "cuda" in names or "cuda" in os.path.basename(find_library(str(platform), os.environ))


def _read_setting(name: str) -> Any:
    """Return a setting of jax.config. None: it is not set, or this JAX does not have it."""
    return getattr(getattr(sys.modules.get("jax"), "config", None), name, None)


def can_use_cuda() -> bool:
    """Return whether a plugin of CUDA is installed, and the program asks for no other platforms. Nothing is opened."""
    from importlib.util import find_spec

    platforms = _read_setting("jax_platforms")
    if platforms and not {"cuda", "gpu"} & {name.strip() for name in platforms.lower().split(",")}:
        return False
    plugins = find_spec("jax_plugins")
    folders = () if plugins is None else plugins.submodule_search_locations or ()
    return any("cuda" in name for folder in folders if os.path.isdir(folder) for name in os.listdir(folder))


# ---- intercepting

_installed: EntryPointWrappers | None = None


def intercept(policy: PolicyCallbacks) -> tuple[str, ...]:
    """Wrap the entry points of the JAX that is loaded. A second call only changes the policy.

    Returns:
        The entry points that are not where they should be, in a JAX that this release does not know.
    """
    global _installed  # noqa: PLW0603 - JAX's own entry points are global
    if _installed is not None:
        _installed.policy = policy
        _installed.listed_by = 0
        return ()
    wrappers = EntryPointWrappers(policy)
    if not any(_replace(name, CREATE_CLIENT, wrappers.wrap_create_client) for name in _EXTENSIONS):
        return (CREATE_CLIENT,)
    _replace(_BRIDGE, FIRST_LISTING, wrappers.wrap_discovery)
    _replace(_HARDWARE, "has_visible_nvidia_gpu", wrappers.wrap_gpu_check)
    # A fork waits for an entry point to be left: the child would inherit the locks of modules imported there.
    wrappers.follow_forks()
    _installed = wrappers
    return ()


def _replace(module_name: str, name: str, wrap: Callable[[Function], Function]) -> bool:
    """Replace a function in its module. Return whether it is there."""
    module = sys.modules.get(module_name)
    original = getattr(module, name, None)
    if module is None or not callable(original):
        return False
    setattr(module, name, wrap(original))
    return True


def apply_publicly(policy: PolicyCallbacks) -> None:
    """Write the policy into the variables that JAX reads, just before it does, if that can be told."""
    from tfenv.frameworks.jax.environment import limit_by_variables

    guard = EntryPointGuard(policy, FIRST_LISTING)

    def wrap_discovery(original: Function) -> Function:
        @wraps(original)
        def discover_and_register() -> Any:
            guard.before_listing()
            limit_by_variables(policy.get_plan(), os.environ)
            return original()

        return discover_and_register

    if not _replace(_BRIDGE, FIRST_LISTING, wrap_discovery):
        limit_by_variables(policy.get_plan(), os.environ)


def watch_use(policy: PolicyCallbacks) -> None:
    """Ask a policy from now on whenever the program asks JAX for devices. A second call does nothing."""
    for name in ("backends", "get_backend"):
        watch_function(sys.modules.get(_BRIDGE), name, policy)
