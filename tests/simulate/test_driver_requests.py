"""Summing up the driver's log."""

from __future__ import annotations

from pathlib import Path

import pytest

from tfenv.simulate.driver_requests import (
    DriverRequest,
    GpuRequestTotals,
    find_cuda_processes,
    read_requests,
    summarise_requests,
)

LINE = '{"pid": 7, "op": "alloc", "gpu": 0, "bytes": 10, "held": 10, "call": "cuMemAlloc"}\n'


def make_alloc(pid: int, gpu: int, size: int, held: int) -> DriverRequest:
    return DriverRequest(pid, "alloc", gpu, size, held, "cuMemAlloc")


def make_free(pid: int, gpu: int, size: int, held: int) -> DriverRequest:
    return DriverRequest(pid, "free", gpu, size, held, "cuMemFree")


def make_init(pid: int) -> DriverRequest:
    return DriverRequest(pid, "cuInit", -1, 4, 0, "cuInit")


def test_peaks_of_one_process_and_of_all() -> None:
    """Peaks are what was held at once: frees count, and processes are told apart."""
    requests = [
        make_init(1), make_alloc(1, 0, 100, 100), make_init(2), make_alloc(2, 0, 50, 150),
        make_free(1, 0, 100, 50), make_alloc(1, 0, 70, 120),
    ]  # fmt: skip
    assert summarise_requests(requests) == {0: GpuRequestTotals(0, 3, 0, 100, 150, 100, (1, 2))}
    assert find_cuda_processes(requests) == {1, 2}


def test_reused_process_id_starts_with_nothing() -> None:
    """A new program under an old process id does not inherit what its predecessor held."""
    requests = [make_init(1), make_alloc(1, 0, 100, 100), make_init(1), make_alloc(1, 0, 60, 60)]
    assert summarise_requests(requests)[0].peak_process == 100


def test_refused_requests_are_counted_and_not_held() -> None:
    """An allocation out of memory is a request, and adds nothing to the peak."""
    refused = DriverRequest(1, "oom", 3, 10**12, 0, "cuMemAlloc")
    assert summarise_requests([make_init(1), refused]) == {3: GpuRequestTotals(3, 1, 1, 10**12, 0, 0, (1,))}


def test_no_log_is_no_requests(tmp_path: Path) -> None:
    """A log nobody has written yet is empty."""
    assert read_requests(tmp_path / "absent") == ()


def test_line_being_written_is_left_out(tmp_path: Path) -> None:
    """What follows the last newline is not complete."""
    log = tmp_path / "log"
    log.write_text(LINE + LINE[:-10])
    assert read_requests(log) == (make_alloc(7, 0, 10, 10),)
    assert read_requests(log, pid=8) == ()


@pytest.mark.parametrize("line", ["x", "{}", "[]", '{"pid": null}'])
def test_names_the_line_that_is_no_request(tmp_path: Path, line: str) -> None:
    """A file that is not such a log is refused with its line."""
    log = tmp_path / "log"
    log.write_text(LINE + line + "\n")
    with pytest.raises(ValueError, match=r"log:2: not a request"):
        read_requests(log)
