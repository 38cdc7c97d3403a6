"""Two of four GPUs, growth, 1000 MiB: whatever a program does with PyTorch, by what the driver was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from tests.frameworks.harness import Case, Report, World

Reports = Callable[[Case], Report]

LIMIT_MIB = 1000
POLICY = '[gpu]\nvisible_devices = [1, 3]\nmemory_growth = true\nmemory_limit = "1000MiB"\n'
MAIN = World(POLICY, framework="torch")
RAW = World(None, armed=False, framework="torch")
CONF = "PYTORCH_ALLOC_CONF"
NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"
FRACTION = "per_process_memory_fraction"

#: What takes more than the limit without a policy, and what is allowed with one.
GREEDY = {
    "module": ("train",),
    "loader": ("load",),
    "own-fraction": ("fraction:1.0", "fill"),
    "settings": (f"settings:{FRACTION}:0.9", "fill"),
    "expandable": ("settings:expandable_segments:True", "fill"),
    "no-caching": ("initialise", "no_caching", "fill"),
    "raw-alloc": ("raw_alloc",),
    "pool": ("pool",),
    "graph": ("graph",),
    "script": ("script",),
    "threads": ("race",),
    "spawn": ("spawn",),
    "fork": ("fork",),
}
MORE_GREEDY = {
    "loader-after-init": ("load:init",),
    "old-settings": (f"old_settings:{FRACTION}:0.9", "fill"),
    "spaced-settings": (f"settings:expandable_segments : True, {FRACTION} : 0.9", "fill"),
    "unclear-settings": (f"settings:{FRACTION}:0.9x", "fill"),
    "settings-script": (f"settings:{FRACTION}:0.9", "script"),
    "unclear-script": (f"settings:{FRACTION}:0x1p-1", "script"),
    "settings-after-init": ("initialise", f"settings:{FRACTION}:0.9", "fill"),
    "late-variable": (f"variable:{CONF}={FRACTION}:0.9", "fill"),
    "late-no-caching": (f"variable:{NO_CACHING}=1", "fill"),
    "late-no-caching-script": (f"variable:{NO_CACHING}=1", "script"),
    "generator": ("generator", "fill"),
    "stream": ("stream", "fill"),
    "pinned": ("pinned", "fill"),
    "script-then-python": ("script", "fraction:1.0", "fill"),
    "pool-with-own-allocator": ("pluggable_pool",),
    "counted-then-forked": ("are_counted", "fork"),
    "loader-in-a-fork": ("fork:load",),
}
#: What the program sets in the environment before the import. A World each.
VARIABLES = {
    "expandable": (CONF, "expandable_segments:True"),
    "async": (CONF, "backend:cudaMallocAsync"),
    "no-caching": (NO_CACHING, "1"),
}
MORE_VARIABLES = {
    "fraction": (CONF, f"{FRACTION}:0.9"),
    "old-name": ("PYTORCH_CUDA_ALLOC_CONF", f"expandable_segments:True,{FRACTION}:0.9"),
}
#: What PyTorch refuses in its own words.
REFUSED = {
    "unknown-key": ("settings:foo:1", "fill"),
    "fraction-beyond-1": (f"settings:{FRACTION}:1.5", "fill"),
    "no-number": (f"settings:{FRACTION}:abc", "fill"),
    "partly-wrong": (f"settings:{FRACTION}:0.9,foo:1", "fill"),
    "own-fraction-beyond-1": ("fraction:1.5", "fill"),
    "own-allocator-too-late": ("initialise", "pluggable"),
}


def list_pairs(ways: Mapping[str, tuple[str, ...]], *, exhaustive: bool = False) -> list[object]:
    """One parameter a way: the case as it is, and under the policy."""
    marks = [pytest.mark.exhaustive] if exhaustive else []
    return [pytest.param((Case(RAW, steps), Case(MAIN, steps)), id=name, marks=marks) for name, steps in ways.items()]


def list_worlds(variables: Mapping[str, tuple[str, str]], *, exhaustive: bool = False) -> list[object]:
    """One parameter a variable: the case under the policy."""
    marks = [pytest.mark.exhaustive] if exhaustive else []
    worlds = {name: World(POLICY, before=(variable,), framework="torch") for name, variable in variables.items()}
    return [pytest.param(Case(world, ("fill",)), id=name, marks=marks) for name, world in worlds.items()]


def check_bounds(report: Report) -> None:
    """What holds whatever the program does: these GPUs, and never more than the limit of any."""
    assert report.visible == {2}
    assert set(report.gpus) <= {1, 3}
    assert all(report.peak_mib(gpu) <= LIMIT_MIB for gpu in report.gpus)


@pytest.mark.parametrize("cases", list_pairs(GREEDY) + list_pairs(MORE_GREEDY, exhaustive=True))
def test_a_greedy_program_gets_the_limit_and_ends_as_without_a_policy(
    cases: tuple[Case, Case], reports: Reports
) -> None:
    """What takes gigabytes of one of four GPUs without a policy gets 1000 MiB, and returns the same."""
    raw, governed = map(reports, cases)
    assert raw.visible == {4}
    assert raw.peak_mib(0) > LIMIT_MIB
    check_bounds(governed)
    assert governed.peak_mib(1) >= 900
    assert governed.error is None
    assert governed.results == raw.results


@pytest.mark.parametrize("case", list_worlds(VARIABLES) + list_worlds(MORE_VARIABLES, exhaustive=True))
def test_a_variable_of_the_program_lifts_no_limit(case: Case, reports: Reports) -> None:
    """Whatever the environment says of the allocator when PyTorch is imported, the limit holds."""
    report = reports(case)
    check_bounds(report)
    assert report.peak_mib(1) >= 900


@pytest.mark.parametrize("case", [Case(MAIN, ("settings:expandable_segments:True", "fill"))])
def test_expandable_segments_stay_usable(case: Case, reports: Reports) -> None:
    """A program that asks for expandable segments gets them: virtual memory, within the limit."""
    report = reports(case)
    check_bounds(report)
    assert {request.call for request in report.requests if request.op == "alloc"} == {"cuMemCreate"}


@pytest.mark.parametrize("case", [Case(MAIN, ("fill_both",))])
def test_each_gpu_has_the_limit(case: Case, reports: Reports) -> None:
    """The limit is for each GPU: a program can have 1000 MiB of both."""
    report = reports(case)
    check_bounds(report)
    assert [report.peak_mib(gpu) for gpu in (1, 3)] == [LIMIT_MIB] * 2


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(MAIN, ("fraction:0.02", "fill")), id="call"),
        pytest.param(Case(MAIN, (f"settings:{FRACTION}:0.02", "fill")), id="settings"),
        pytest.param(Case(MAIN, (f"settings:{FRACTION}:0.02", "script")), id="script", marks=pytest.mark.exhaustive),
    ],
)
def test_a_smaller_fraction_of_the_program_stays(case: Case, reports: Reports) -> None:
    """2% of 24 GiB are less than the limit, so that the program has what it asked for, and nothing is noted."""
    report = reports(case)
    check_bounds(report)
    assert 0 < report.peak_mib(1) <= 0.02 * 24576
    assert "clamped" not in report.codes


@pytest.mark.parametrize("case", [Case(MAIN, ("fraction:1.0", "read_fraction"))])
def test_the_fraction_that_pytorch_tells_is_the_one_that_holds(case: Case, reports: Reports) -> None:
    """A program that asks for all of a card and reads the fraction back is told the truth, and a record says so."""
    report = reports(case)
    assert report.visible == {2}
    assert report.results[1] == pytest.approx(LIMIT_MIB / 24576)
    notes = [f["message"] for record in report.records for f in record["findings"] if f["code"] == "clamped"]
    assert len(notes) == 1
    assert "set_per_process_memory_fraction" in notes[0]


@pytest.mark.parametrize("cases", list_pairs(REFUSED))
def test_pytorch_refuses_in_its_own_words(cases: tuple[Case, Case], reports: Reports) -> None:
    """What PyTorch refuses, it refuses under a policy with the same exception and text."""
    raw, governed = map(reports, cases)
    assert raw.error is not None
    assert governed.error == raw.error


OPENING = {
    "counted": ("device_count",),
    "available": ("available",),
    "fork-after-available": ("available", "fork"),
    "fork-after-init": ("initialise", "fork"),
    "saved": ("saved",),
}


@pytest.mark.parametrize("cases", list_pairs(OPENING))
def test_cuda_is_opened_as_without_a_policy(cases: tuple[Case, Case], reports: Reports) -> None:
    """A policy opens CUDA neither earlier nor later: a forked child that cannot use it without one cannot with one."""
    raw, governed = map(reports, cases)
    assert raw.error is None
    assert governed.error is None
    assert governed.cuda_opened == raw.cuda_opened == (cases[0].steps != ("device_count",))
    assert [request.op for request in governed.requests] == [request.op for request in raw.requests]
    assert governed.results[1:] == raw.results[1:]


@pytest.mark.parametrize(
    ("case", "count"),
    [
        pytest.param(Case(MAIN, ("count",)), 2, id="policy"),
        pytest.param(Case(MAIN, ("variable:CUDA_VISIBLE_DEVICES=1", "count")), 1, id="narrowed"),
        pytest.param(Case(MAIN, ("variable:CUDA_VISIBLE_DEVICES=2,3", "count")), 1, id="partly-allowed"),
        pytest.param(Case(MAIN, ("variable:CUDA_VISIBLE_DEVICES=0", "count")), 2, id="not-allowed"),
        pytest.param(Case(MAIN, ("variable:CUDA_VISIBLE_DEVICES=", "count")), 0, id="none"),
    ],
)
def test_gpus_are_counted_alike_before_and_after_cuda_is_opened(case: Case, count: int, reports: Reports) -> None:
    """A program that writes a list after the import counts as many GPUs through NVML as CUDA shows then."""
    report = reports(case)
    assert report.visible == {count}
    assert report.results[-1] == [count, count > 0, count]


@pytest.mark.parametrize(
    "case", [Case(MAIN, ("device_count", "variable:CUDA_VISIBLE_DEVICES=0", "fill")), Case(MAIN, ("pluggable_pool",))]
)
def test_what_comes_between_counting_and_opening_lifts_nothing(case: Case, reports: Reports) -> None:
    """A list that the program writes after it counted GPUs, and a pool with an allocator of its own, are held."""
    report = reports(case)
    check_bounds(report)
    assert report.gpus


@pytest.mark.parametrize("case", [Case(MAIN, ("fill",))])
def test_the_record_names_each_gpu_with_its_limit(case: Case, reports: Reports) -> None:
    """The record of the entry point has both GPUs with their limit, and names PyTorch."""
    report = reports(case)
    check_bounds(report)
    record = report.passed("_cuda_init")
    assert record["status"] == "applied"
    assert record["framework"] == "torch"
    assert [device["limit_bytes"] for device in record["devices"]] == [LIMIT_MIB << 20] * 2


@pytest.mark.parametrize(
    "case", [Case(World(POLICY, before=((CONF, "backend:cudaMallocAsync"),), framework="torch"), ("script", "fill"))]
)
@pytest.mark.exhaustive
def test_script_before_python_with_cuda_malloc_async_is_a_finding(case: Case, reports: Reports) -> None:
    """CUDA's own allocator ignores the setting: what TorchScript took before is said once torch.cuda is used."""
    report = reports(case)
    assert report.visible == {2}
    assert report.peak_mib(1) > LIMIT_MIB
    assert "unsupported" in report.codes
