"""Two of four GPUs, growth, 1000 MiB: whatever a program does with JAX, by what the driver was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from tests.frameworks.harness import Case, Report, World

Reports = Callable[[Case], Report]

LIMIT_MIB = 1000
MAIN = World('[gpu]\nvisible_devices = [1, 2]\nmemory_growth = true\nmemory_limit = "1000MiB"\n', framework="jax")
RAW = World(None, armed=False, framework="jax", inherited=(("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),))

#: What every program does. The others are variations of it.
COMPUTING = {name: (name,) for name in ("jit", "sgd", "keras_fit")}
MORE_COMPUTING = {name: (name,) for name in ("pmap", "shard", "optax_step")}
LISTING = {
    "devices": ("devices",),
    "platforms": ("devices_of:cuda",),
    "gpu": ("devices_of:gpu",),
    "threads": ("threads",),
    "forked-first": ("forked",),
    "forked-after": ("gpu_ids", "forked"),
    "spawned": ("spawned",),
    "one-gpu": ("config:jax_cuda_visible_devices=1", "take_200"),
    "cpu": ("env:JAX_PLATFORMS=cpu", "config:jax_platforms=cpu", "devices"),
    "cpu-cuda": ("config:jax_platforms=cpu,cuda", "devices_of:cuda"),
}
#: What asks for more than the limit: the variable or setting that records name, and the steps. 0.9 is 21.6 GiB.
WIDER = {
    "fraction": ("XLA_CLIENT_MEM_FRACTION", ("env:XLA_CLIENT_MEM_FRACTION=0.9",)),
    "beyond-the-card": ("XLA_CLIENT_MEM_FRACTION", ("env:XLA_CLIENT_MEM_FRACTION=1.5",)),
    "old-fraction": ("XLA_PYTHON_CLIENT_MEM_FRACTION", ("env:XLA_PYTHON_CLIENT_MEM_FRACTION=0.9",)),
    "platform": ("XLA_PYTHON_CLIENT_ALLOCATOR", ("env:XLA_PYTHON_CLIENT_ALLOCATOR=platform",)),
    "cuda-async": ("XLA_PYTHON_CLIENT_ALLOCATOR", ("env:XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async",)),
    "preallocate": ("XLA_PYTHON_CLIENT_PREALLOCATE", ("env:XLA_PYTHON_CLIENT_PREALLOCATE=true",)),
    "unified": ("TF_FORCE_UNIFIED_MEMORY", ("env:TF_FORCE_UNIFIED_MEMORY=1", "env:XLA_CLIENT_MEM_FRACTION=1.5")),
    "collective": (
        "XLA_PYTHON_CLIENT_COLLECTIVE_MEM_SIZE_MB",
        ("env:XLA_PYTHON_CLIENT_COLLECTIVE_MEM_SIZE_MB=4096",),
    ),
    "separate-pool": ("XLA_FLAGS", ("env:XLA_FLAGS=--xla_gpu_temp_buffer_use_separate_color",)),
    "option-fraction": ("jax_pjrt_client_create_options: memory_fraction", ("option:memory_fraction=0.9",)),
    "option-allocator": ("jax_pjrt_client_create_options: allocator", ("option:allocator=platform",)),
    "option-preallocate": ("jax_pjrt_client_create_options: preallocate", ("option:preallocate=True",)),
}
#: What stays as the program asked: it is within the limit.
KEPT = {
    "small-fraction": ("env:XLA_CLIENT_MEM_FRACTION=0.02",),
    "bfc": ("env:XLA_PYTHON_CLIENT_ALLOCATOR=bfc",),
    "vmm": ("env:XLA_PYTHON_CLIENT_ALLOCATOR=vmm",),
    "option-small-fraction": ("option:memory_fraction=0.02",),
    "other-client": ("env:XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT=1",),
    "unchecked": ("env:JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1",),
}
#: What JAX refuses in its own words.
REFUSED = {
    "both-fractions": ("env:XLA_CLIENT_MEM_FRACTION=0.9", "env:XLA_PYTHON_CLIENT_MEM_FRACTION=0.9", "devices"),
    "a-string": ("config:jax_pjrt_client_create_options=memory_fraction:0.9", "devices"),
    "a-string-preallocate": ("config:jax_pjrt_client_create_options=preallocate:true", "devices"),
    "an-unknown-option": ("option:nonsense=0.5", "devices"),
    "an-unknown-allocator": ("env:XLA_PYTHON_CLIENT_ALLOCATOR=nonsense", "devices"),
    "no-gpu": ("config:jax_cuda_visible_devices=-1", "devices"),
    "cuda-fraction-alone": ("config:jax_platforms=cuda", "option:memory_fraction=all", "devices"),
}


def list_pairs(ways: Mapping[str, tuple[str, ...]], *, exhaustive: bool = False) -> list[object]:
    """One parameter a way: the case as it is, and under the policy."""
    marks = [pytest.mark.exhaustive] if exhaustive else []
    return [pytest.param((Case(RAW, steps), Case(MAIN, steps)), id=name, marks=marks) for name, steps in ways.items()]


def check_bounds(report: Report) -> None:
    """What holds whatever the program does: these GPUs, and never more than the limit of any."""
    assert report.visible == {2}
    assert set(report.gpus) <= {1, 2}
    assert all(report.peak_mib(gpu) <= LIMIT_MIB for gpu in report.gpus)


def check_refusal(report: Report) -> None:
    """JAX gave memory, and refused what goes beyond the limit."""
    check_bounds(report)
    assert report.peak_mib(1) >= 100 or report.peak_mib(2) >= 100
    assert report.error is not None
    assert "RESOURCE_EXHAUSTED" in report.error["text"]


@pytest.mark.parametrize("cases", list_pairs(COMPUTING) + list_pairs(MORE_COMPUTING, exhaustive=True))
def test_a_program_computes_as_without_a_policy_on_two_gpus(cases: tuple[Case, Case], reports: Reports) -> None:
    """A program that fits into the limit runs as it does without a policy, on the two GPUs and with little memory."""
    if cases[0].steps == ("optax_step",):
        pytest.importorskip("optax")
    raw, governed = map(reports, cases)
    assert raw.error is None
    assert raw.visible == {4}
    assert governed.error is None
    check_bounds(governed)
    assert governed.gpus
    assert all(governed.first_mib(gpu) <= 16 for gpu in governed.gpus)


@pytest.mark.parametrize("cases", list_pairs(LISTING))
def test_a_program_lists_the_two_gpus_and_ends_as_without_a_policy(cases: tuple[Case, Case], reports: Reports) -> None:
    """However a program asks for devices, it ends as it does without a policy, and has the two GPUs at most."""
    raw, governed = map(reports, cases)
    assert (raw.error is None) == (governed.error is None)
    assert raw.cuda_opened == governed.cuda_opened
    assert set(governed.gpus) <= {1, 2}
    if governed.cuda_opened:
        check_bounds(governed)


@pytest.mark.parametrize("case", [Case(MAIN, ("take_much:0",)), Case(MAIN, ("take_much:1",))], ids=["first", "second"])
def test_a_greedy_program_is_refused_at_the_limit(case: Case, reports: Reports) -> None:
    """JAX refuses what goes beyond 1000 MiB of a GPU as it refuses what the card does not have."""
    report = reports(case)
    check_refusal(report)
    taken = int(case.steps[0].partition(":")[2]) + 1
    assert report.peak_mib(taken) >= 900


@pytest.mark.parametrize("case", [Case(RAW, ("take_much:0",)), Case(RAW, ("take_much:1",))], ids=["first", "second"])
def test_without_a_policy_the_same_program_takes_more(case: Case, reports: Reports) -> None:
    """The program that is refused at the limit takes 1500 MiB of one of four GPUs where there is none."""
    report = reports(case)
    assert report.visible == {4}
    assert report.results == [1500]
    assert report.peak_mib(int(case.steps[0].partition(":")[2])) >= 1500


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, Case(MAIN, (*steps, "take")), id=key) for key, (name, steps) in WIDER.items()],
)
def test_a_wider_request_is_cut_to_the_limit_and_noted(name: str, case: Case, reports: Reports) -> None:
    """Whatever the program sets after the import to get more, it gets the limit, and a record says so."""
    report = reports(case)
    check_refusal(report)
    notes = [f for record in report.records for f in record["findings"] if f["code"] == "clamped"]
    assert any(name in note["message"] for note in notes)


def list_before() -> list[object]:
    """The same settings in the environment before the import. A World each: the process sets them once."""
    params: list[object] = []
    for key, (name, steps) in WIDER.items():
        variables = tuple(tuple(step.removeprefix("env:").split("=", 1)) for step in steps if step.startswith("env:"))
        if variables:
            world = World(MAIN.policy, framework="jax", before=variables)  # type: ignore[arg-type]
            marks = [] if key in ("beyond-the-card", "platform") else [pytest.mark.exhaustive]
            params.append(pytest.param(name, Case(world, ("take",)), id=key, marks=marks))
    return params


@pytest.mark.parametrize(("name", "case"), list_before())
def test_a_wider_request_before_the_import_is_cut_to_the_limit(name: str, case: Case, reports: Reports) -> None:
    """What the program sets before the import is held to the limit like what it sets after it."""
    report = reports(case)
    check_refusal(report)
    assert any(name in f["message"] for record in report.records for f in record["findings"])


@pytest.mark.parametrize(
    "case", [pytest.param(Case(MAIN, (*steps, "take_200", "take")), id=key) for key, steps in KEPT.items()]
)
def test_a_narrower_request_stays(case: Case, reports: Reports) -> None:
    """A fraction below the limit stays the program's own, and so does an allocator that keeps the limit."""
    report = reports(case)
    check_bounds(report)
    assert report.results[-1] == 200
    assert "clamped" not in report.codes
    assert report.peak_mib(1) <= (500 if "0.02" in case.steps[0] else LIMIT_MIB)


@pytest.mark.parametrize("cases", list_pairs(REFUSED))
def test_what_jax_refuses_it_refuses_in_its_own_words(cases: tuple[Case, Case], reports: Reports) -> None:
    """Options that JAX refuses are refused under a policy as without one, and no GPU gives memory."""
    raw, governed = map(reports, cases)
    assert raw.error == governed.error
    assert raw.results == governed.results
    assert raw.error is not None or raw.results[-1] == ["cpu"]
    assert governed.visible == {2}
    assert not governed.gpus


def list_governed(*steps: str) -> pytest.MarkDecorator:
    """One case under the policy, as a parameter: cases that are announced run together."""
    return pytest.mark.parametrize("case", [Case(MAIN, steps)], ids=["governed"])


@list_governed(*LISTING["cpu"])
def test_a_program_that_asks_for_the_cpu_opens_no_cuda(case: Case, reports: Reports) -> None:
    """JAX_PLATFORMS=cpu means no GPU, and a policy does not open any."""
    report = reports(case)
    assert report.results[-1] == ["cpu"]
    assert not report.cuda_opened


@list_governed(*LISTING["one-gpu"])
def test_devices_that_the_program_names_count_within_the_policys(case: Case, reports: Reports) -> None:
    """The program's 1 is the second GPU that the policy shows."""
    report = reports(case)
    assert report.visible == {2}
    assert set(report.gpus) == {2}


@list_governed("config:jax_cuda_visible_devices=3", "gpu_ids")
def test_devices_that_the_policy_hides_leave_the_allowed_ones(case: Case, reports: Reports) -> None:
    """A program that names only GPUs beyond those of the policy has those of the policy, and a record says so."""
    report = reports(case)
    assert report.visible == {2}
    assert report.results[-1] == [0, 1]
    assert "no-overlap" in report.codes


@list_governed("take_200", "drop", "clear_backends", "take_200", "drop", "limits_mib")
def test_a_second_client_gets_what_the_first_gave_back(case: Case, reports: Reports) -> None:
    """Backends that are cleared give their memory back, so that the next ones may take it."""
    report = reports(case)
    assert report.error is None
    assert len(report.results[-1]) == 2
    assert report.peak_mib(1) >= 200
    check_bounds(report)


_BESIDE = ("take_200", "clear_backends", "devices", "devices_of:cuda")


@pytest.mark.parametrize(("without", "case"), [(Case(RAW, _BESIDE[:-1]), Case(MAIN, _BESIDE))], ids=["both"])
def test_a_second_client_beside_the_first_gets_no_gpu(without: Case, case: Case, reports: Reports) -> None:
    """A client that is held keeps all that the process may take: the next falls back to the CPU, and JAX says why."""
    raw, governed = reports(without), reports(case)
    assert raw.results[-1] == ["gpu"] * 4
    assert governed.results[-1] == ["cpu"]
    assert governed.error is not None
    assert "earlier clients of this process" in governed.error["text"]
    assert "budget-spent" in governed.codes
    check_bounds(governed)


@list_governed("option:memory_fraction=0.02", "take_200", "clear_backends", "option:memory_fraction=0.9", "take")
def test_a_small_first_client_leaves_the_rest_to_the_second(case: Case, reports: Reports) -> None:
    """A client that took a part by its own wish leaves the rest of the limit to the next."""
    report = reports(case)
    check_refusal(report)
    assert report.peak_mib(1) > 200


@list_governed(*LISTING["spawned"])
def test_the_record_of_the_end_has_the_peak(case: Case, reports: Reports) -> None:
    """A process that spawn started records how much it held of each GPU at most."""
    report = reports(case)
    assert report.results == [[["gpu", "gpu"], 200]]
    ended = next(record for record in report.records if record["event"] == "policy_ended")
    assert [device["peak_bytes"] >= 200 << 20 for device in ended["devices"]] == [True, False]
