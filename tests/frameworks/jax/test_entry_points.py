"""The functions in JAX's place, with modules that stand in for JAX's."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tfenv.errors import Finding, PolicyError
from tfenv.frameworks.jax import entry_points
from tfenv.frameworks.jax.framework import Jax
from tfenv.policy.model import MemoryLimit, Origin, Outcome, Plan, PlannedDevice

GIB = 1 << 30
LIMIT = Origin("project", "tfgpu.toml", ("gpu", "memory_limit"))
CARDS = tuple(
    PlannedDevice(str(number), limit=MemoryLimit(bytes=2 * GIB), cuda_total=24 * GIB, limited_by=(LIMIT,))
    for number in range(2)
)


class Policy:
    """A policy of two GPUs and 2 GiB, which notes what it is asked."""

    def __init__(self) -> None:
        self.plan = Plan(visible="0,1", devices=CARDS, growth=True, allocator="bfc")
        self.calls: list[str] = []
        self.outcomes: list[Outcome] = []
        self.faults: list[str] = []
        self.cpu_only = self.faults_leave_no_gpu = False
        self.refusal: PolicyError | None = None

    def before_listing(self, _sleep: object = None) -> None:
        self.calls.append("before_listing")
        if self.refusal is not None:
            raise self.refusal

    def identify_devices(self, _ordinals: object = None) -> Mapping[int, PlannedDevice] | None:
        self.calls.append("identify_devices")
        return dict(enumerate(self.plan.devices or ()))

    def count_shown_devices(self) -> int | None:
        return len(self.plan.devices or ())

    def get_plan(self) -> Plan:
        return self.plan

    def is_cpu_only(self) -> bool:
        return self.cpu_only

    def check_use(self) -> None:
        self.calls.append("check_use")

    def report(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def report_fault(self, error: Exception, entry_point: str) -> None:
        self.faults.append(f"{entry_point}: {error}")
        self.cpu_only = self.faults_leave_no_gpu


class Client:
    """What the plugin creates."""


class Jaxlib:
    """JAX's modules, as far as a policy looks at them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.discovered = 0
        self.extension = self._add(monkeypatch, "jaxlib._jax", get_c_api_client=self.create)
        self._add(monkeypatch, "jaxlib", __version__="0.10.2")
        self.hardware = self._add(monkeypatch, "jax._src.hardware_utils", has_visible_nvidia_gpu=lambda: True)
        self.config = SimpleNamespace(jax_platforms=None, jax_pjrt_client_create_options=None)
        self._add(monkeypatch, "jax", config=self.config)
        self.bridge = self._add(
            monkeypatch,
            "jax._src.xla_bridge",
            _discover_and_register_pjrt_plugins=self.discover,
            backends=dict,
            get_backend=dict,
            _backend_factories={"cuda": object()},
            _backend_errors={},
            _backends={},
        )

    def _add(self, monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> ModuleType:
        module = ModuleType(name)
        for member, value in members.items():
            setattr(module, member, value)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    def create(self, platform_name: str, options: Mapping[str, Any], *_others: object) -> Client:
        if options.get("fails"):
            raise RuntimeError("no such device")
        self.created.append((platform_name, dict(options)))
        return Client()

    def discover(self) -> None:
        self.discovered += 1


@pytest.fixture
def jaxlib(monkeypatch: pytest.MonkeyPatch) -> Jaxlib:
    monkeypatch.setattr(entry_points, "_installed", None)
    monkeypatch.setattr(entry_points.EntryPointWrappers, "follow_forks", lambda _self: None)
    monkeypatch.setattr(entry_points, "can_use_cuda", lambda: True)
    return Jaxlib(monkeypatch)


@pytest.fixture
def policy(jaxlib: Jaxlib) -> Any:
    policy: Any = Policy()
    assert entry_points.intercept(policy) == ()
    return policy


def test_a_client_of_cuda_gets_the_policys_options(jaxlib: Jaxlib, policy: Any) -> None:
    """The options on their way to the plugin are held to the policy, and an outcome says so."""
    jaxlib.extension.get_c_api_client("cuda", {"memory_fraction": 0.9, "platform_name": "cuda"}, None)
    ((platform, options),) = jaxlib.created
    assert platform == "cuda"
    assert options["preallocate"] is False
    assert options["memory_fraction"] * 24 * GIB <= 2 * GIB
    assert [outcome.status for outcome in policy.outcomes] == ["clamped"]
    assert policy.outcomes[0].growth is True


def test_options_can_be_named(jaxlib: Jaxlib, policy: Any) -> None:
    """The function takes its arguments by their names, too."""
    jaxlib.extension.get_c_api_client(platform_name="cuda", options={})
    assert jaxlib.created[0][1]["preallocate"] is False


@pytest.mark.parametrize("platform", ["tpu", "rocm", "oneapi", "other"])
def test_other_plugins_pass_untouched(platform: str, jaxlib: Jaxlib, policy: Any) -> None:
    """A policy of CUDA's GPUs is none of another plugin's business."""
    jaxlib.extension.get_c_api_client(platform, {"memory_fraction": 0.9})
    assert jaxlib.created == [(platform, {"memory_fraction": 0.9})]
    assert policy.calls == []


def test_the_plugin_of_cuda_under_another_name_is_governed(
    jaxlib: Jaxlib, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may load the plugin by a name of its own."""
    monkeypatch.setenv("PJRT_NAMES_AND_LIBRARY_PATHS", "mine:/opt/xla_cuda_plugin.so,other:/opt/other.so")
    jaxlib.extension.get_c_api_client("mine", {})
    assert jaxlib.created[0][1]["preallocate"] is False


def test_visibility_is_settled_before_plugins_are_discovered(jaxlib: Jaxlib, policy: Any) -> None:
    """The plugin of CUDA opens it while it is discovered. That is the last moment."""
    jaxlib.bridge._discover_and_register_pjrt_plugins()
    assert policy.calls == ["before_listing"]
    assert jaxlib.discovered == 1
    assert policy.outcomes == []


def test_plugins_that_are_registered_are_not_settled_again(jaxlib: Jaxlib, policy: Any) -> None:
    """JAX calls the function whenever it looks for a backend."""
    jaxlib.bridge._plugins_registered = True  # type: ignore[attr-defined]
    jaxlib.bridge._discover_and_register_pjrt_plugins()
    assert policy.calls == []
    assert jaxlib.discovered == 1


def test_without_a_plugin_of_cuda_nothing_is_settled(
    jaxlib: Jaxlib, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program on the CPU takes no GPU away from others."""
    monkeypatch.setattr(entry_points, "can_use_cuda", lambda: False)
    jaxlib.bridge._discover_and_register_pjrt_plugins()
    assert policy.calls == []
    assert jaxlib.discovered == 1


def test_a_refusal_is_raised_from_the_discovery(jaxlib: Jaxlib, policy: Any) -> None:
    """JAX swallows what a plugin raises while it is discovered. With on_error = "fail" nothing is discovered."""
    policy.refusal = PolicyError((Finding("busy", "no GPU is free"),))
    with pytest.raises(PolicyError):
        jaxlib.bridge._discover_and_register_pjrt_plugins()
    assert jaxlib.discovered == 0


def test_a_plugin_that_finds_no_gpu_is_reported(jaxlib: Jaxlib, policy: Any) -> None:
    """JAX falls back to the CPU. There are no silent days on it."""
    jaxlib.bridge._backend_factories.clear()
    jaxlib.bridge._discover_and_register_pjrt_plugins()
    assert [finding.code for outcome in policy.outcomes for finding in outcome.findings] == ["no-gpu"]


def test_a_process_without_a_gpu_goes_on_with_the_cpu(jaxlib: Jaxlib, policy: Any) -> None:
    """JAX leaves CUDA out of its backends, and knows why when the program asks for it."""
    policy.cpu_only = True
    assert not jaxlib.hardware.has_visible_nvidia_gpu()
    assert "the policy gives JAX no GPU" in jaxlib.bridge._backend_errors["cuda"]
    assert [outcome.status for outcome in policy.outcomes] == ["cpu"]


def test_a_program_that_insists_on_cuda_is_refused_by_jax(jaxlib: Jaxlib, policy: Any) -> None:
    """Where the program names its platforms, the client's creation raises as JAX's own failures do."""
    policy.cpu_only = True
    jaxlib.config.jax_platforms = "cuda"
    assert jaxlib.hardware.has_visible_nvidia_gpu()
    with pytest.raises(RuntimeError, match="the policy gives JAX no GPU"):
        jaxlib.extension.get_c_api_client("cuda", {})
    assert jaxlib.created == []


def test_a_machine_without_gpus_is_jaxs_own_business(jaxlib: Jaxlib, policy: Any) -> None:
    """Where JAX sees no GPU, the policy is not asked."""
    jaxlib.bridge._backend_factories.clear()
    assert jaxlib.hardware.has_visible_nvidia_gpu()
    assert policy.calls == []


def test_the_memory_of_a_client_that_is_gone_is_given_to_the_next(jaxlib: Jaxlib, policy: Any) -> None:
    """A client counts as long as something refers to it."""
    first = jaxlib.extension.get_c_api_client("cuda", {})
    with pytest.raises(RuntimeError, match="earlier clients"):
        jaxlib.extension.get_c_api_client("cuda", {})
    del first
    gc.collect()
    jaxlib.extension.get_c_api_client("cuda", {})
    assert len(jaxlib.created) == 2
    assert jaxlib.created[0] == jaxlib.created[1]


def test_a_client_that_could_not_be_created_holds_nothing(jaxlib: Jaxlib, policy: Any) -> None:
    """JAX's own failure passes, and the next try has all of the limit."""
    with pytest.raises(RuntimeError, match="no such device"):
        jaxlib.extension.get_c_api_client("cuda", {"fails": True})
    jaxlib.extension.get_c_api_client("cuda", {})
    assert len(jaxlib.created) == 1


#: A size is no fraction of a card whose memory nobody tells: a fault of tfenv's.
UNSIZED = Plan(visible="0", devices=(PlannedDevice("0", limit=MemoryLimit(bytes=GIB)),))


def test_a_fault_of_tfenv_is_reported_and_the_program_goes_on(jaxlib: Jaxlib, policy: Any) -> None:
    """A fault of tfenv is for `on_error` to decide. Where the program may go on, it has its own options."""
    policy.plan = UNSIZED
    jaxlib.extension.get_c_api_client("cuda", {"memory_fraction": 0.9})
    assert "nobody tells the memory of GPU 0" in policy.faults[0]
    assert jaxlib.created == [("cuda", {"memory_fraction": 0.9})]


def test_a_fault_of_tfenv_may_leave_no_gpu(jaxlib: Jaxlib, policy: Any) -> None:
    """With on_error = "cpu" a fault means no GPU."""
    policy.plan, policy.faults_leave_no_gpu = UNSIZED, True
    with pytest.raises(RuntimeError, match="no GPU"):
        jaxlib.extension.get_c_api_client("cuda", {})
    assert policy.faults
    assert jaxlib.created == []


def test_what_defeats_a_limit_is_cleared_at_the_last_moment(
    jaxlib: Jaxlib, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program may set variables after the import. JAX reads them when it creates the client."""
    monkeypatch.setenv("TF_FORCE_UNIFIED_MEMORY", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true --xla_gpu_memory_fraction_policy=0.9")
    jaxlib.extension.get_c_api_client("cuda", {})
    assert jaxlib.created
    assert "TF_FORCE_UNIFIED_MEMORY" not in os.environ
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true"


def test_the_plugins_release_decides_whether_it_gets_a_range(jaxlib: Jaxlib, policy: Any) -> None:
    """JAX 0.12 takes a range, and earlier ones refuse it."""
    jaxlib.extension.get_c_api_client("cuda", {})
    sys.modules["jaxlib"].__version__ = "0.12.0.1"  # type: ignore[attr-defined]
    gc.collect()
    jaxlib.extension.get_c_api_client("cuda", {})
    assert ["memory_fraction_policy" in options for _, options in jaxlib.created] == [False, True]


def test_a_second_policy_takes_the_place_of_the_first(jaxlib: Jaxlib, policy: Any) -> None:
    """The import of JAX may fail once and succeed then: what is wrapped stays, under the new policy."""
    wrapped = jaxlib.extension.get_c_api_client
    other: Any = Policy()
    assert entry_points.intercept(other) == ()
    assert jaxlib.extension.get_c_api_client is wrapped
    jaxlib.extension.get_c_api_client("cuda", {})
    assert policy.outcomes == []
    assert other.outcomes


def test_an_older_jaxlib_has_the_function_elsewhere(jaxlib: Jaxlib, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is now jaxlib._jax was jaxlib.xla_extension."""
    monkeypatch.delitem(sys.modules, "jaxlib._jax")
    extension = jaxlib._add(monkeypatch, "jaxlib.xla_extension", get_c_api_client=jaxlib.create)
    policy: Any = Policy()
    assert entry_points.intercept(policy) == ()
    extension.get_c_api_client("cuda", {})
    assert jaxlib.created[0][1]["preallocate"] is False


def test_a_jax_without_the_function_is_governed_by_variables(jaxlib: Jaxlib, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the entry point is missing, the variables that JAX reads hold what they can, just before it reads them."""
    monkeypatch.delattr(jaxlib.extension, "get_c_api_client")
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")
    policy: Any = Policy()
    assert entry_points.intercept(policy) == ("get_c_api_client",)
    Jax().apply_publicly(policy)
    assert policy.calls == []
    jaxlib.bridge._discover_and_register_pjrt_plugins()
    assert policy.calls == ["before_listing"]
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] == "default"
    assert float(os.environ["XLA_CLIENT_MEM_FRACTION"]) * 24 * GIB <= 2 * GIB


def test_use_of_devices_asks_the_policy_once_it_is_watched(jaxlib: Jaxlib, policy: Any) -> None:
    """What is another task's GPU by now is refused when the program asks JAX for devices."""
    Jax().watch_use(policy)
    Jax().watch_use(policy)
    jaxlib.bridge.get_backend()
    jaxlib.bridge.backends()
    assert policy.calls == ["check_use", "check_use"]


def test_a_client_tells_that_devices_exist_and_what_they_held(jaxlib: Jaxlib) -> None:
    """Peaks are read from the clients that are there, in the order of CUDA."""
    device = {
        number: SimpleNamespace(local_hardware_id=number, memory_stats=lambda n=number: {"peak_bytes_in_use": n})
        for number in range(2)
    }
    framework: Any = Jax()
    created = {"get_c_api_client": CARDS}
    assert not framework.devices_exist(gpu_is_open=True)
    assert framework.read_peaks(created) == ()
    jaxlib.bridge._backends["cuda"] = SimpleNamespace(platform="gpu", local_devices=lambda: [device[1], device[0]])
    assert framework.devices_exist(gpu_is_open=False)
    assert framework.read_peaks(created) == ((CARDS[0], 0), (CARDS[1], 1))


def test_jax_names_its_version_and_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client keeps its limit, and JAX is nobody's helper."""
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(__version__="0.10.2"))
    framework = Jax()
    assert framework.version() == "0.10.2"
    assert framework.find_master(("tensorflow",)) is None
    assert not framework.release_memory()
