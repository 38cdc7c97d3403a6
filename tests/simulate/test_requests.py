"""Summing up the driver's log."""

from __future__ import annotations

from pathlib import Path

import pytest

from tfenv.simulate.requests import GpuRequests, Request, opened_cuda, read_requests, summarise

LINE = '{"pid": 7, "op": "alloc", "gpu": 0, "bytes": 10, "held": 10, "call": "cuMemAlloc"}\n'


def alloc(pid: int, gpu: int, size: int, held: int) -> Request:
    return Request(pid, "alloc", gpu, size, held, "cuMemAlloc")


def free(pid: int, gpu: int, size: int, held: int) -> Request:
    return Request(pid, "free", gpu, size, held, "cuMemFree")


def opened(pid: int) -> Request:
    return Request(pid, "cuInit", -1, 4, 0, "cuInit")


def test_peaks_of_one_process_and_of_all() -> None:
    """Peaks are what was held at once: frees count, and processes are told apart."""
    requests = [
        opened(1), alloc(1, 0, 100, 100), opened(2), alloc(2, 0, 50, 150), free(1, 0, 100, 50), alloc(1, 0, 70, 120),
    ]  # fmt: skip
    assert summarise(requests) == {0: GpuRequests(0, 3, 0, 100, 150, 100, (1, 2))}
    assert opened_cuda(requests) == {1, 2}


def test_reused_process_id_starts_with_nothing() -> None:
    """A new program under an old process id does not inherit what its predecessor held."""
    requests = [opened(1), alloc(1, 0, 100, 100), opened(1), alloc(1, 0, 60, 60)]
    assert summarise(requests)[0].peak_process == 100


def test_refused_requests_are_counted_and_not_held() -> None:
    """An allocation out of memory is a request, and adds nothing to the peak."""
    refused = Request(1, "oom", 3, 10**12, 0, "cuMemAlloc")
    assert summarise([opened(1), refused]) == {3: GpuRequests(3, 1, 1, 10**12, 0, 0, (1,))}


def test_no_log_is_no_requests(tmp_path: Path) -> None:
    """A log nobody has written yet is empty."""
    assert read_requests(tmp_path / "absent") == ()


def test_line_being_written_is_left_out(tmp_path: Path) -> None:
    """What follows the last newline is not complete."""
    log = tmp_path / "log"
    log.write_text(LINE + LINE[:-10])
    assert read_requests(log) == (alloc(7, 0, 10, 10),)
    assert read_requests(log, pid=8) == ()


@pytest.mark.parametrize("line", ["x", "{}", "[]", '{"pid": null}'])
def test_names_the_line_that_is_no_request(tmp_path: Path, line: str) -> None:
    """A file that is not such a log is refused with its line."""
    log = tmp_path / "log"
    log.write_text(LINE + line + "\n")
    with pytest.raises(ValueError, match=r"log:2: not a request"):
        read_requests(log)
