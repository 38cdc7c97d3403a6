"""Other policies than the plain one: what each GPU was asked for under them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.frameworks.harness import Case, Report, World, run_program

Reports = Callable[[Case], Report]

UNLIKE = """
[gpu]
visible_devices = [1, 3]
memory_limit = "2000MiB"
[[gpu.device]]
match = 1
memory_limit = "1000MiB"
"""
ONE_RULE = '[[gpu.device]]\nmatch = 1\nmemory_limit = "1000MiB"\n'
CHOICE = '[gpu]\nvisible_devices = {count = 1}\nmemory_limit = "1000MiB"\n'
PLAIN = '[gpu]\nvisible_devices = [1, 3]\nmemory_limit = "1000MiB"\n'


def make_world(policy: str, gpus: str = "4x24GiB") -> World:
    """Make a World for PyTorch."""
    return World(policy, gpus=gpus, framework="torch")


def read_peaks(report: Report) -> dict[int, float]:
    """Return the peak of each GPU that memory was asked of."""
    return {gpu: report.peak_mib(gpu) for gpu in report.gpus}


@pytest.mark.parametrize(
    ("case", "count", "peaks"),
    [
        pytest.param(Case(make_world(UNLIKE), ("fill_both",)), 2, {1: 1000, 3: 2000}, id="unlike"),
        # One setting holds both cards before torch.cuda is initialised.
        pytest.param(Case(make_world(UNLIKE), ("script",)), 2, {1: 1000}, id="unlike-script"),
        pytest.param(Case(make_world(ONE_RULE), ("fill_both",)), 4, {0: 3000, 1: 1000}, id="rule"),
        pytest.param(Case(make_world('[gpu]\nmemory_limit = "5%"\n'), ("fill",)), 4, {0: 1200}, id="share"),
        pytest.param(
            Case(make_world('[gpu]\nmemory_limit = "5%"\n', "24GiB,48GiB"), ("fill_both",)),
            2,
            {0: 1200, 1: 2400},
            id="share-of-unlike-cards",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            Case(make_world('[gpu]\nmemory_limit = "1000MiB"\n', "24GiB,48GiB"), ("fill_both",)),
            2,
            {0: 1000, 1: 1000},
            id="size-on-unlike-cards",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            Case(make_world("[gpu]\nvisible_devices = [1, 3]\n"), ("pluggable",)), 2, {1: 3000}, id="no-limit"
        ),
    ],
)
def test_each_gpu_gets_what_the_policy_says(case: Case, count: int, peaks: dict[int, float], reports: Reports) -> None:
    """Blocks of 100 MiB up to the limit of each card, on the cards of the policy."""
    report = reports(case)
    assert report.error is None
    assert report.visible == {count}
    assert read_peaks(report) == peaks


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(make_world(CHOICE), ("count", "fill")), id="plain"),
        pytest.param(Case(make_world(CHOICE), ("device_count", "variable:CUDA_VISIBLE_DEVICES=2", "fill")), id="late"),
        pytest.param(Case(make_world(CHOICE), ("spawn",)), id="spawn"),
        pytest.param(Case(make_world(CHOICE), ("device_count", "fork")), id="fork"),
    ],
)
def test_one_gpu_is_chosen_before_it_is_counted(case: Case, reports: Reports) -> None:
    """The choice is made when a program first counts GPUs, and nothing afterwards adds another one."""
    report = reports(case)
    assert report.visible == {1}
    assert [report.peak_mib(gpu) for gpu in report.gpus] == [1000]
    choices = [record["choice"] for record in report.records if record.get("choice")]
    assert choices


@pytest.mark.parametrize("case", [Case(make_world('[gpu]\nvisible_devices = "none"\n'), ("count", "initialise"))])
def test_without_gpus_pytorch_says_so_itself(case: Case, reports: Reports) -> None:
    """A policy of no GPU: none is counted, and PyTorch refuses CUDA in its own words."""
    report = reports(case)
    assert report.results == [[0, False, 0]]
    assert report.error is not None
    assert report.error["text"] == "No CUDA GPUs are available"
    assert not report.gpus


@pytest.mark.parametrize("on_error", ["fail", "cpu"])
def test_a_program_that_counts_no_gpu_hears_why(on_error: str, tmp_path: Path, needs_torch: None) -> None:
    """A count of 0 is all that many programs ask for. With "fail" it raises, and with "cpu" the line says why."""
    world = make_world(f'on_error = "{on_error}"\n[gpu]\nvisible_devices = [7]\n')
    ended = run_program(world, "import torch\nprint(torch.cuda.device_count())\n", tmp_path)
    assert (ended.status, ended.stdout) == ((1, "") if on_error == "fail" else (0, "0\n")), ended.stderr
    assert "[no-overlap]" in "\n".join((*ended.ours, ended.stderr))


def list_own_allocators(on_error: str) -> Case:
    """The case of an allocator of the program's own, under a policy with this on_error."""
    return Case(make_world(f'on_error = "{on_error}"\n{PLAIN}'), ("pluggable",))


@pytest.mark.parametrize("case", [list_own_allocators("warn")])
def test_an_allocator_of_the_programs_own_is_a_finding(case: Case, reports: Reports) -> None:
    """Nothing holds an allocator that the program brings: it gets what it takes, and an error is on record."""
    report = reports(case)
    assert report.error is None
    assert report.peak_mib(1) == 3000
    assert any("[unsupported]" in line for line in report.ours)
    assert "unsupported" in report.codes


@pytest.mark.parametrize("case", [list_own_allocators("fail")])
def test_an_allocator_of_the_programs_own_is_refused_where_the_policy_says_so(case: Case, reports: Reports) -> None:
    """With on_error = "fail" the change raises, before CUDA is opened."""
    report = reports(case)
    assert report.error is not None
    assert report.error["kinds"][0] == "PolicyError"
    assert not report.cuda_opened


@pytest.mark.parametrize("case", [list_own_allocators("cpu")])
def test_an_allocator_of_the_programs_own_costs_the_gpus_where_the_policy_says_so(case: Case, reports: Reports) -> None:
    """With on_error = "cpu" there is no GPU from then on."""
    report = reports(case)
    assert report.error is not None
    assert report.error["text"] == "No CUDA GPUs are available"
    assert not report.gpus
