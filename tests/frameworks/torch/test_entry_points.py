"""The entry points on a PyTorch that is not there: builds and versions that the tests' environment does not have."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tfenv.errors import Finding
from tfenv.frameworks.registry import get_framework
from tfenv.frameworks.torch import interception
from tfenv.frameworks.torch.entry_points import EntryPointWrappers
from tfenv.policy.model import Device, MemoryLimit, Origin, Outcome, Plan, PlannedDevice

GIB = 1 << 30
ORIGIN = Origin("project", "/srv/tfgpu.toml", ("gpu", "memory_limit"))


def make_plan(*limits: MemoryLimit | None, total: int | None = 24 * GIB) -> Plan:
    """Make a plan of some GPUs."""
    devices = tuple(
        PlannedDevice(str(index), Device(index, f"GPU-{index}", "Simulated GPU", total), limit, limited_by=(ORIGIN,))
        for index, limit in enumerate(limits)
    )
    return Plan(visible="0", devices=devices)


class FakePolicy:
    """A policy that answers with one plan, and remembers what was reported."""

    def __init__(self, plan: Plan, *, cpu_only: bool = False, spent: bool = False) -> None:
        self.plan = plan
        self.cpu_only = cpu_only
        self.spent = spent
        self.outcomes: list[Outcome] = []
        self.unkept: list[Finding] = []
        self.faults: list[Exception] = []

    def before_listing(self, sleep: object = None) -> None:
        """Do nothing."""

    def identify_devices(
        self,
        ordinals: Sequence[int] | None = None,  # noqa: ARG002 - the protocol's
    ) -> Mapping[int, PlannedDevice]:
        """Return the plan's GPUs in their order."""
        return dict(enumerate(self.plan.devices or ()))

    def measure_devices(self) -> tuple[PlannedDevice, ...] | None:
        """Return the plan's GPUs."""
        return () if self.spent else self.plan.devices

    def count_shown_devices(self) -> int:
        """Return how many there are."""
        return len(self.plan.devices or ())

    def get_plan(self) -> Plan:
        """Return the plan."""
        return self.plan

    def is_cpu_only(self) -> bool:
        """Return whether there is to be no GPU."""
        return self.cpu_only

    def check_use(self) -> None:
        """Do nothing."""

    def report(self, outcome: Outcome) -> None:
        """Remember the outcome."""
        self.outcomes.append(outcome)

    def report_unkept(self, finding: Finding, entry_point: str) -> None:  # noqa: ARG002 - the protocol's
        """Remember the finding."""
        self.unkept.append(finding)

    def report_fault(self, error: Exception, entry_point: str) -> None:  # noqa: ARG002 - the protocol's
        """Remember the fault."""
        self.faults.append(error)


class FakeCore(ModuleType):
    """`torch._C` of an older PyTorch: fractions only, once it is initialised."""

    def __init__(self, count: int = 2) -> None:
        super().__init__("torch._C")
        self.count = count
        self.fraction = 1.0
        self.fractions: dict[int, float] = {}
        self.reserved = 0
        self.initialised = False

    def _cuda_init(self) -> None:
        self.initialised = True
        self.fractions = dict.fromkeys(range(self.count), self.fraction)

    def _cuda_getDeviceCount(self) -> int:  # noqa: N802 - PyTorch's name
        return self.count

    def _cuda_setMemoryFraction(self, fraction: float, device: int) -> None:  # noqa: N802 - PyTorch's name
        self.fractions[device] = fraction

    def _cuda_memoryStats(self, device: int) -> Mapping[str, Any]:  # noqa: N802 - PyTorch's name
        if not self.initialised or device >= self.count:
            raise RuntimeError("Invalid device argument")
        return {"reserved_bytes": {"all": {"current": self.reserved, "peak": 2 * self.reserved}}}


class NewerCore(FakeCore):
    """`torch._C` with the allocator's settings."""

    def __init__(self, count: int = 2) -> None:
        super().__init__(count)
        self.settings: list[str] = []

    def _accelerator_setAllocatorSettings(self, text: str) -> None:  # noqa: N802 - PyTorch's name
        self.settings.append(text)
        self.fraction = float(text.partition(":")[2])


@pytest.fixture(autouse=True)
def _own_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test have a PyTorch of its own."""
    monkeypatch.setattr(interception, "_installed", None)
    monkeypatch.setattr("os.register_at_fork", lambda **_: None)


def install(monkeypatch: pytest.MonkeyPatch, core: ModuleType, *, cuda: str | None = "12.8") -> SimpleNamespace:
    """Put a PyTorch in place. Return its `torch.cuda`."""

    def lazy_init() -> None:
        core._cuda_init()

    module = SimpleNamespace(
        is_initialized=lambda: getattr(core, "initialised", False),
        _device_count_nvml=lambda: 2,
        _get_device_properties=lambda _: SimpleNamespace(total_memory=24 * GIB),
        _lazy_init=lazy_init,
        device_count=lambda: 2,
        set_per_process_memory_fraction=getattr(core, "_cuda_setMemoryFraction", None),
    )
    monkeypatch.setitem(sys.modules, "torch._C", core)
    monkeypatch.setitem(sys.modules, "torch.cuda", module)
    monkeypatch.setitem(sys.modules, "torch.version", SimpleNamespace(cuda=cuda, hip=None))
    return module


def intercept(policy: FakePolicy) -> EntryPointWrappers:
    """Wrap the entry points, none of which is missing."""
    assert interception.intercept(policy) == ()
    installed = interception.get_installed()
    assert installed is not None
    return installed


SIX_OF_24 = MemoryLimit(bytes=6 * GIB)


def test_a_build_without_cuda_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrapped, missing or reported in a build for the CPU."""
    install(monkeypatch, ModuleType("torch._C"), cuda=None)
    policy = FakePolicy(make_plan(SIX_OF_24))
    assert interception.intercept(policy) == ()
    assert interception.get_installed() is None
    assert not get_framework("torch").can_use_gpus()
    assert not get_framework("torch").release_memory()


def test_an_older_pytorch_is_limited_once_it_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the setting each GPU gets its fraction at init, and a finding says what is not limited before."""
    core = FakeCore()
    install(monkeypatch, core)
    policy = FakePolicy(make_plan(SIX_OF_24, None))
    intercept(policy)
    core._cuda_init()
    assert core.fractions == {0: 0.25, 1: 1.0}
    findings = [finding for outcome in policy.outcomes for finding in outcome.findings]
    assert [(finding.code, finding.severity) for finding in findings] == [("unsupported", "warning")]


def test_memory_that_cpp_took_before_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing limits TorchScript, what it took before torch.cuda was used is for on_error to decide."""
    core = FakeCore()
    install(monkeypatch, core)
    policy = FakePolicy(make_plan(SIX_OF_24, None))
    intercept(policy)
    core.initialised = True
    core._cuda_init()
    assert [finding.code for finding in policy.unkept] == ["unsupported"]
    assert core.fractions == {0: 0.25, 1: 1.0}


def test_a_setting_that_does_not_know_the_fraction_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that refuses the fraction as a setting is treated as one without settings."""
    core = FakeCore()

    def refuse(text: str) -> None:
        raise ValueError(text)

    monkeypatch.setattr(core, "_accelerator_setAllocatorSettings", refuse, raising=False)
    install(monkeypatch, core)
    policy = FakePolicy(make_plan(SIX_OF_24, SIX_OF_24))
    intercept(policy)
    core._cuda_init()
    assert core.fractions == {0: 0.25, 1: 0.25}
    assert not policy.faults
    assert "unsupported" in {finding.code for outcome in policy.outcomes for finding in outcome.findings}


def test_the_setting_holds_the_smallest_fraction_right_after_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before CUDA is open all GPUs have the smallest fraction, and each its own from then on."""
    core = NewerCore()
    install(monkeypatch, core)
    intercept(FakePolicy(make_plan(MemoryLimit(bytes=12 * GIB), SIX_OF_24)))
    assert core.settings == ["per_process_memory_fraction:0.25"]
    assert not core.initialised
    core._cuda_init()
    assert core.fractions == {0: 0.5, 1: 0.25}


def test_without_a_limit_the_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy of visible GPUs sets no fraction and changes no setting."""
    core = NewerCore()
    install(monkeypatch, core)
    policy = FakePolicy(make_plan(None, None))
    intercept(policy)
    core._cuda_init()
    core._cuda_setMemoryFraction(0.9, 0)
    core._accelerator_setAllocatorSettings("per_process_memory_fraction:0.9")
    assert core.settings == ["per_process_memory_fraction:0.9"]
    assert core.fractions == {0: 0.9, 1: 1.0}
    assert [outcome.status for outcome in policy.outcomes] == ["applied"]


def test_pytorch_tells_the_size_that_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size without NVML is applied once CUDA is open, and a finding says what is not limited before."""
    core = NewerCore()
    install(monkeypatch, core)
    policy = FakePolicy(make_plan(SIX_OF_24, total=None))
    intercept(policy)
    core.count = 1
    core._cuda_init()
    assert core.fractions == {0: 0.25}
    assert "unknown-memory" in {finding.code for outcome in policy.outcomes for finding in outcome.findings}


def test_memory_is_released_where_none_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another framework gets the limit: every fraction becomes 0, and the program cannot lift it."""
    core = NewerCore()
    install(monkeypatch, core)
    intercept(FakePolicy(make_plan(SIX_OF_24, SIX_OF_24)))
    core._cuda_init()
    assert get_framework("torch").release_memory()
    assert core.fractions == {0: 0.0, 1: 0.0}
    core._cuda_setMemoryFraction(1.0, 1)
    assert core.fractions == {0: 0.0, 1: 0.0}
    assert core.settings[-1] == "per_process_memory_fraction:0.0"


def test_memory_that_is_held_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps what it was promised if it holds any of it."""
    core = NewerCore()
    install(monkeypatch, core)
    intercept(FakePolicy(make_plan(SIX_OF_24, SIX_OF_24)))
    core._cuda_init()
    core.reserved = 2 << 20
    assert not get_framework("torch").release_memory()
    assert core.fractions == {0: 0.25, 1: 0.25}


def test_there_is_no_gpu_where_others_have_the_whole_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither NVML nor CUDA counts a GPU, C++ gets no memory, and init fails as where there is none."""
    core = NewerCore()
    cuda = install(monkeypatch, core)
    policy = FakePolicy(make_plan(SIX_OF_24, SIX_OF_24), cpu_only=True, spent=True)
    intercept(policy)
    assert core.settings == ["per_process_memory_fraction:0.0"]
    assert (cuda._device_count_nvml(), core._cuda_getDeviceCount()) == (0, 0)
    with pytest.raises(RuntimeError, match=r"^No CUDA GPUs are available$"):
        core._cuda_init()
    assert not core.initialised
    assert [outcome.status for outcome in policy.outcomes] == ["cpu", "cpu"]


def test_a_fault_of_ours_is_reported_and_pytorch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in tfenv is for on_error to decide. The setting still holds."""
    core = NewerCore()
    install(monkeypatch, core)
    policy = FakePolicy(make_plan(SIX_OF_24, SIX_OF_24))
    intercept(policy)
    monkeypatch.setattr("tfenv.frameworks.torch.limits.make_limits", None)
    core._cuda_init()
    assert core.initialised
    assert {type(fault) for fault in policy.faults} == {TypeError}
    assert core.settings == ["per_process_memory_fraction:0.25"]


def test_a_second_import_changes_the_policy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points are wrapped once. The latest policy holds."""
    core = NewerCore()
    install(monkeypatch, core)
    first = intercept(FakePolicy(make_plan(SIX_OF_24, SIX_OF_24)))
    assert intercept(FakePolicy(make_plan(MemoryLimit(bytes=3 * GIB), None))) is first
    core._cuda_init()
    assert core.fractions == {0: 0.125, 1: 1.0}


def test_missing_entry_points_leave_what_public_calls_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch without the entry points is limited by torch.cuda's own call, once it is initialised."""
    core = FakeCore()
    cuda = install(monkeypatch, core)
    monkeypatch.setattr(FakeCore, "_cuda_init", None)
    policy = FakePolicy(make_plan(SIX_OF_24, None))
    assert interception.intercept(policy) == ("_cuda_init",)

    def initialise() -> None:
        core.initialised = True

    cuda._lazy_init = initialise
    get_framework("torch").apply_publicly(policy)
    cuda._lazy_init()
    assert core.fractions == {0: 0.25}
    assert [outcome.status for outcome in policy.outcomes] == ["degraded"]
