"""PyTorch's entry points: the few functions of `torch._C` through which Python opens CUDA or changes the allocator.

Each is replaced right after PyTorch's own code ran and before the program gets the module. C++ has ways into CUDA that
pass none of them (TorchScript, `torch.cuda.Stream`): a setting of the allocator, made right after the import, limits
those. Nothing here opens CUDA before PyTorch does.
"""

from __future__ import annotations

import os
import sys
from functools import wraps

from tfenv.frameworks.guard import EntryPointGuard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tfenv.errors import Finding, Severity
    from tfenv.frameworks.base import PolicyCallbacks
    from tfenv.frameworks.torch.limits import GpuLimit
    from tfenv.policy.model import Outcome

    Function = Callable[..., Any]

#: The one that opens CUDA for nearly everything.
INIT = "_cuda_init"
COUNT = "_cuda_getDeviceCount"
SET_FRACTION = "_cuda_setMemoryFraction"
SET_SETTINGS = "_accelerator_setAllocatorSettings"
CHANGE_ALLOCATOR = "_cuda_changeCurrentAllocator"
ENABLE_CACHING = "_cuda_cudaCachingAllocator_enable"

#: What the policy cannot do without.
ENTRY_POINTS = (INIT, COUNT, SET_FRACTION)

#: They open CUDA, too. Public functions reach them without `_cuda_init`.
OPENERS = (
    "_accelerator_deviceCount",
    "_accelerator_hooks_device_count",
    "_cuda_hasPrimaryContext",
    "_get_accelerator",
)

_VISIBLE = "CUDA_VISIBLE_DEVICES"
#: What PyTorch says where it finds no GPU.
_NO_GPU_ERROR = "No CUDA GPUs are available"


class EntryPointWrappers:
    """PyTorch's original functions, and what takes their place.

    Attributes:
        guard: Settles visibility, and keeps tfenv's faults from the program.
        core: `torch._C`.
        limits: The GPUs and their limits, since CUDA was opened. Before that (): they are not known.
        limited: The policy limits memory.
        fraction: The smallest of the fractions that the policy allows on a GPU.
        asked: The fraction that the program itself set for all GPUs.
        is_closed: Other frameworks have all that the process may take.
    """

    def __init__(self, policy: PolicyCallbacks, core: Any) -> None:
        """
        Args:
            policy: The policy of this process.
            core: `torch._C`.
        """
        self.guard = EntryPointGuard(policy, INIT)
        self.core = core
        self.limits: tuple[GpuLimit, ...] = ()
        self.limited = False
        self.fraction = 1.0
        self.asked = 1.0
        self.is_closed = False
        self._notes: tuple[Finding, ...] = ()
        self._is_held = False  # by the setting: GPUs that allow more have to be told
        self._is_made_early = False  # by C++, with the setting as it was then
        self._counted_by = 0  # pid: it knows whether it may use GPUs
        self._visible_at_import = os.environ.get(_VISIBLE)
        self._settled_early: tuple[str | None] | None = None  # the variable's value, until CUDA is opened
        self._reported: set[object] = set()
        self._init: Function = getattr(core, INIT)
        self._count: Function = getattr(core, COUNT)
        self._set_fraction: Function = getattr(core, SET_FRACTION)
        self._set_settings: Function | None = getattr(core, SET_SETTINGS, None)

    @property
    def policy(self) -> PolicyCallbacks:
        """The policy of this process."""
        return self.guard.policy

    # -- before CUDA is opened

    def limit_early(self) -> None:
        """Limit the ways into CUDA that pass no entry point. The setting holds the smallest fraction on every GPU."""
        from tfenv.frameworks.torch.limits import compute_fraction, find_smallest
        from tfenv.frameworks.torch.settings import clamp_settings, report_fraction_clamp

        plan, devices = self.policy.get_plan(), self.policy.measure_devices()
        if devices is None:
            fractions = [compute_fraction(plan.limit, None)]
        else:
            fractions = [compute_fraction(gpu.limit, gpu.total, gpu.card_total) for gpu in devices]
        self.is_closed = devices == () and plan.devices != ()
        self.fraction = 0.0 if self.is_closed else find_smallest(fractions)
        self.limited = self.fraction < 1 or None in fractions
        if not self.limited:
            return
        if None in fractions:
            self._note_unlimited("nobody says how much memory the GPUs have before CUDA is open", "unknown-memory")
        # C++ reads PYTORCH_NO_CUDA_MEMORY_CACHING once: now, before the program can set it.
        getattr(self.core, "_cuda_cudaCachingAllocator_is_enabled", bool)()
        if self._name_backend() != "native":
            self._note_unlimited(f"{self._name_backend()} ignores the setting", "unsupported", "note")
        read = getattr(self.core, "_accelerator_getAllocatorSettings", str)
        of_environment = clamp_settings(read(), self.fraction)
        self.asked = 1.0 if of_environment.asked is None else of_environment.asked
        if of_environment.asked is not None and self.asked > self.fraction:
            self._notes += (report_fraction_clamp("PYTORCH_ALLOC_CONF", self.asked, self.fraction, plan),)
        self._hold_setting()

    def _hold_setting(self) -> None:
        """Set the smallest fraction, or the program's own if it is smaller, for GPUs that are opened from now on."""
        from tfenv.frameworks.torch.settings import FRACTION

        if not (self.limited or self._is_held):
            return
        try:
            if self._set_settings is not None:
                self._set_settings(f"{FRACTION}:{min(self.fraction, self.asked)!r}")
                self._is_held = True
                return
        except (RuntimeError, ValueError):  # it knows the call and not the setting
            self._set_settings = None
        self._note_unlimited("this PyTorch has no setting for it", "unsupported")

    def _note_unlimited(self, why: str, code: str, severity: Severity = "warning") -> None:
        from tfenv.errors import Finding

        text = f"TorchScript and streams that open CUDA before torch.cuda does are not limited: {why}"
        note = Finding(code, text, severity)
        if note not in self._notes:
            self._notes += (note,)

    @property
    def _is_limited_early(self) -> bool:
        """Whether the setting holds. The allocator of CUDA itself ignores it."""
        return self._set_settings is not None and self._name_backend() == "native"

    def is_allocator_made(self) -> bool:
        """Return whether PyTorch has made its allocators of GPU memory."""
        tell = getattr(self.core, "_accelerator_isAllocatorInitialized", None)
        if tell is not None:
            return bool(tell())
        try:
            read_reserved(self.core, 0, "current")
        except RuntimeError:  # without an allocator there is no device 0
            return False
        return True

    def _name_backend(self) -> str:
        return str(getattr(self.core, "_cuda_getAllocatorBackend", lambda: "native")())

    # -- opening CUDA

    def settle(self) -> None:
        """Settle which GPUs are visible, once per process."""
        if self.guard.listed_by != os.getpid():
            self._settled_early = None
            self.guard.before_listing()
        elif self._settled_early is not None and self._settled_early[0] != (visible := os.environ.get(_VISIBLE)):
            # CUDA is not open yet, and would open what the program wrote after it had counted others.
            self._notes += (_make_late_note(visible),)
            _write_variable(_VISIBLE, self._settled_early[0])

    def settle_early(self) -> None:
        """Settle it before the program counts GPUs while CUDA is closed, where that makes a difference."""
        changed = os.environ.get(_VISIBLE) != self._visible_at_import
        if self.guard.listed_by != os.getpid() and (changed or self.policy.get_plan().choosing is not None):
            self.settle()
            self._settled_early = (os.environ.get(_VISIBLE),)

    def is_in_bad_fork(self) -> bool:
        """Return whether this process was forked from one that had opened CUDA. PyTorch refuses to use GPUs in it."""
        return bool(getattr(self.core, "_cuda_isInBadFork", bool)())

    def wrap_opener(self, original: Function) -> Function:
        """Wrap a function that opens CUDA and creates nothing."""

        @wraps(original)
        def open_devices(*args: Any, **kwargs: Any) -> Any:
            self.settle()
            result = original(*args, **kwargs)
            self._settled_early = None
            return result

        return open_devices

    def wrap_count(self, original: Function) -> Function:
        """Wrap _cuda_getDeviceCount. `torch.cuda.is_available` opens CUDA with it."""

        @wraps(original)
        def count_devices() -> Any:
            if self.is_in_bad_fork():
                return original()
            self.settle()
            count = original()
            self._settled_early = None
            self._look_once(count)
            return 0 if self.policy.is_cpu_only() else count

        return count_devices

    def _look_once(self, count: int) -> None:
        """Find out whether PyTorch may use the GPUs that it lists, once per process. CUDA is open."""
        with self.guard.lock:
            if self._counted_by != os.getpid():
                self.guard.run_guarded(COUNT, lambda: self._look(count))
                self._counted_by = os.getpid()

    def _look(self, count: int) -> None:
        """Say so where there is no GPU: a program that counts none uses the CPU, and goes no further."""
        if not count:
            self.policy.report(_make_outcome(COUNT, self, (_make_no_gpu_finding(),)))
            return
        self.policy.identify_devices()
        if self.policy.is_cpu_only():
            self.policy.report(_make_outcome(COUNT, self, cpu_only=True))

    def wrap_count_by_nvml(self, original: Function) -> Function:
        """Wrap torch.cuda._device_count_nvml, which counts GPUs while CUDA is closed."""

        @wraps(original)
        def count_by_nvml() -> Any:
            self.settle_early()
            if self.is_closed:
                self._look_once(original())
            count = 0 if self.is_closed or self.policy.is_cpu_only() else original()
            if not count and not self.is_in_bad_fork():
                self.settle()  # a program that counts none goes no further: what is wrong is said here or never
                self._look_once(0)
            return count

        return count_by_nvml

    def wrap_init(self, original: Function) -> Function:
        """Wrap _cuda_init."""

        @wraps(original)
        def init() -> Any:
            with self.guard.lock:
                self.settle()
                self.guard.run_guarded(INIT, self._plan_limits)
                if self.policy.is_cpu_only():
                    raise RuntimeError(_NO_GPU_ERROR)
                result = original()
                self._settled_early = None
                self.guard.run_guarded(INIT, self._set_limits)
                if self.policy.is_cpu_only():  # a fault of ours, and on_error = "cpu"
                    raise RuntimeError(_NO_GPU_ERROR)
                return result

        return init

    def _plan_limits(self) -> None:
        """Find the limit of each GPU, and report what is about to be given. This opens CUDA, as PyTorch is about to."""
        from tfenv.frameworks.torch.limits import find_smallest, make_limits
        from tfenv.frameworks.torch.settings import prepare_environment

        self._is_made_early = self.is_allocator_made()
        opened_early = self.limited and not self._is_limited_early and self._is_made_early
        planned = self.policy.identify_devices()
        plan, shown = self.policy.get_plan(), self.policy.count_shown_devices()
        self.is_closed = self.policy.is_cpu_only()
        if self.is_closed:
            self.limits, self.limited, self.fraction = (), True, 0.0
            self._hold_setting()
            self.policy.report(_make_outcome(INIT, self, cpu_only=True))
            return
        self.limits = make_limits(plan, range(shown or 0), planned)
        self.fraction = find_smallest(gpu.fraction for gpu in self.limits)
        self.limited = any(gpu.fraction != 1.0 for gpu in self.limits) or (shown is None and bool(plan.limits))
        self._hold_setting()
        if opened_early:
            self._report_opened_early()
        notes, self._notes = (*self._notes, *prepare_environment(plan, os.environ)), ()
        if not self.limits:
            notes += (_make_no_gpu_finding(),)
        self.policy.report(_make_outcome(INIT, self, notes))

    def _report_opened_early(self) -> None:
        from tfenv.errors import Finding

        text = "CUDA was opened by C++ (TorchScript, a stream) and the GPUs were not limited until now"
        self.policy.report_unkept(Finding("unsupported", f"{text}: use torch.cuda first"), INIT)

    def _set_limits(self) -> None:
        """Set the fraction of each GPU, now that PyTorch has made its allocators."""
        if not (self.limited or self._is_held) or self._name_backend() == "pluggable":
            return
        # To set a fraction may open a context on the GPU, which takes memory. The setting has done it for many.
        is_done = self._is_limited_early and not self._is_made_early
        # The first GPU comes last: some versions of PyTorch make the one they set the current one.
        for gpu in reversed(self._measure_limits()):
            fraction = min(self.asked, 1.0 if gpu.fraction is None else gpu.fraction)
            if not is_done or fraction != min(self.fraction, self.asked):
                self._set_fraction(fraction, gpu.ordinal)

    def _measure_limits(self) -> tuple[GpuLimit, ...]:
        """Return the limits with the sizes that PyTorch tells, where nobody else did."""
        from tfenv.frameworks.torch.limits import make_limits
        from tfenv.values import replace

        count = self._count()
        if len(self.limits) < count:  # the driver did not say which they are
            self.limits = make_limits(self.policy.get_plan(), range(count), None)
        cuda: Any = sys.modules["torch.cuda"]
        read = cuda._get_device_properties  # noqa: SLF001 - the public one initialises
        self.limits = tuple(
            gpu if gpu.fraction is not None else replace(gpu, total=read(gpu.ordinal).total_memory)
            for gpu in self.limits[:count]
        )
        return self.limits

    # -- what the program asks for

    def wrap_set_fraction(self, original: Function) -> Function:
        """Wrap _cuda_setMemoryFraction, which torch.cuda.set_per_process_memory_fraction calls."""

        @wraps(original)
        def set_fraction(fraction: Any, device: Any) -> Any:
            return original(self._clamp_fraction(fraction, device), device)

        return set_fraction

    def _clamp_fraction(self, fraction: Any, device: Any) -> Any:
        from tfenv.frameworks.torch.settings import report_fraction_clamp

        allowed = next((gpu.fraction for gpu in self.limits if gpu.ordinal == device), self.fraction)
        is_number = isinstance(fraction, int | float)
        if not self.limited or allowed is None or not is_number or not allowed < fraction <= 1:
            return fraction
        plan = self.policy.get_plan()
        where = "torch.cuda.set_per_process_memory_fraction"
        self._report_clamp(SET_FRACTION, report_fraction_clamp(where, fraction, allowed, plan))
        return allowed

    def wrap_set_settings(self, original: Function) -> Function:
        """Wrap _accelerator_setAllocatorSettings, and what was its name in older versions."""

        @wraps(original)
        def set_settings(text: Any) -> Any:
            if not self.limited or not isinstance(text, str):
                return original(text)
            from tfenv.frameworks.torch.settings import clamp_settings, report_fraction_clamp

            clamped = clamp_settings(text, self.fraction)
            result = original(clamped.text)
            if clamped.asked is not None or not clamped.certain:
                self.asked = self.fraction if clamped.asked is None else clamped.asked
                if not clamped.certain:
                    self._hold_setting()
                if not clamped.certain or self.asked > self.fraction:
                    note = report_fraction_clamp(
                        "allocator settings", clamped.asked, self.fraction, self.policy.get_plan()
                    )
                    self._report_clamp(original.__name__, note)
            return result

        return set_settings

    def wrap_enable_caching(self, original: Function) -> Function:
        """Wrap _cuda_cudaCachingAllocator_enable."""

        @wraps(original)
        def enable(value: Any) -> Any:
            if not self.limited or value is not False:
                return original(value)
            from tfenv.frameworks.torch.settings import report_no_caching

            self._report_clamp(ENABLE_CACHING, report_no_caching(self.policy.get_plan()))
            return None

        return enable

    def wrap_change_allocator(self, original: Function) -> Function:
        """Wrap _cuda_changeCurrentAllocator."""

        @wraps(original)
        def change_allocator(allocator: Any) -> Any:
            # PyTorch refuses to change an allocator that it uses.
            is_changed = self.limited and not self.is_allocator_made()
            return original(allocator) if not is_changed or self._may_use_allocator() else None

        return change_allocator

    def _may_use_allocator(self) -> bool:
        """Report an allocator of the program's own, which no limit holds. A pool's own allocator is held.

        Returns:
            Whether PyTorch may have it. With `on_error = "cpu"` its own allocator stays.
        """
        from tfenv.errors import Finding

        text = "the program's own allocator of GPU memory (CUDAPluggableAllocator) cannot be limited"
        unkept = Finding("unsupported", text)
        self.guard.run_guarded(CHANGE_ALLOCATOR, lambda: self.policy.report_unkept(unkept, CHANGE_ALLOCATOR))
        return not self.policy.is_cpu_only()

    def _report_clamp(self, entry_point: str, note: Finding) -> None:
        """Report once what the program asked for in vain."""
        if note in self._reported:
            return
        self._reported.add(note)
        outcome = _make_outcome(entry_point, self, (note,))
        self.guard.run_guarded(entry_point, lambda: self.policy.report(outcome))

    # -- giving back

    def release_memory(self) -> bool:
        """Lower every fraction to 0, if PyTorch holds no memory of a GPU. Its lock is not taken: another's is held."""
        ordinals = range(self._count() if self.is_allocator_made() else 0)
        if any(read_reserved(self.core, ordinal, "current") for ordinal in ordinals):
            return False
        self.limited, self.fraction = True, 0.0
        self.limits = tuple(_close(gpu) for gpu in self.limits)
        self._hold_setting()
        for ordinal in reversed(ordinals):
            self._set_fraction(0.0, ordinal)
        return True


def read_reserved(core: Any, ordinal: int, what: str) -> int:
    """Return how much of a GPU the allocator holds ("current"), or held at most ("peak"), in bytes."""
    return int(core._cuda_memoryStats(ordinal)["reserved_bytes"]["all"][what])  # noqa: SLF001 - the public one initialises


def _write_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _make_late_note(visible: str | None) -> Finding:
    from tfenv.errors import Finding

    text = f"the program set {_VISIBLE}={visible or ''} after the GPUs had been counted, which has no effect"
    return Finding("too-late", text, "note")


def _close(gpu: GpuLimit) -> GpuLimit:
    from tfenv.values import replace

    return replace(gpu, planned=None)


def _make_no_gpu_finding() -> Finding:
    """Return the finding that PyTorch has no GPU to use. Whoever reports it knows why."""
    from tfenv.errors import Finding

    return Finding("no-gpu", "PyTorch lists no GPU", "warning")


def _make_outcome(
    entry_point: str, wrappers: EntryPointWrappers, findings: tuple[Finding, ...] = (), *, cpu_only: bool = False
) -> Outcome:
    from tfenv.frameworks.torch.limits import describe_devices
    from tfenv.policy.model import Outcome

    if cpu_only:
        return Outcome("cpu", entry_point, findings=findings)
    clamped = any(finding.code == "clamped" for finding in findings)
    devices = describe_devices(wrappers.limits)
    return Outcome("clamped" if clamped else "applied", entry_point, devices, growth=True, findings=findings)
