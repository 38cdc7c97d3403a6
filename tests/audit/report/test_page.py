"""The page: what it says, and that nothing of a log can do anything on it."""

from __future__ import annotations

import re
from datetime import timezone
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.audit.report.records import GIB, MONDAY, Run, collect, make_device, make_record, write_log
from tfenv.audit.query import LineTally
from tfenv.audit.report.page import make_page
from tfenv.audit.report.times import LocalClock
from tfenv.audit.report.view import make_view
from tfenv.audit.report.words import count, format_ms, name_gpu, name_process, show

pytest.importorskip("msgspec", reason="of the extra report")
pytest.importorskip("vl_convert", reason="of the extra report")

#: What somebody may be called, or call a program, to do something to who looks at the page.
HOSTILE = (
    "</script><script>alert(1)</script>",
    "</title></style><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)' style='x",
    "javascript:alert(1)",
    "{{7*7}} ${7*7} datum.x",
    "a\u202ecod.exe\u2066\x00\x1b[31m\n\t\u2028",
    "<svg><foreignObject><iframe src=//evil.example></svg>",
    "&lt;b&gt; &#0; ]]> -->",
    "\ud800",
    "x" * 5000,
)


def make_html(path: Path, tally: LineTally | None = None) -> str:
    tally = LineTally() if tally is None else tally
    view = make_view(collect(path, tally=tally), LocalClock(timezone.utc))
    return make_page(view, tally, [str(path)], [], MONDAY)


def make_hostile_log(path: Path) -> Path:
    """Write a log whose names are hostile, everywhere."""
    records = []
    for number, name in enumerate(HOSTILE):
        who = {"user": name, "host": name, "script": f"/x/{name}", "start_ticks": number, "job": {"id": name}}
        device = {**make_device(peak=GIB // 9), "uuid": name, "name": name}
        choice = {"waited_ms": 70_000, "lease": name, "allocations": []}
        begin = MONDAY + number * 1000
        records += [
            make_record("applied", begin, devices=[device], choice=choice, would_clamp=[{"key": name}], **who),
            make_record("clamped", begin, devices=[device], cut=[name], **who),
            make_record("failed", begin, findings=[{"code": name, "severity": "error"}], **who),
            make_record("ended", begin + 7_200_000, devices=[device], duration_ms=7_200_000, **who),
        ]
    return write_log(path, records)


class Collector(HTMLParser):
    """Collects the elements, the attributes and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "a":
            assert all(str(value).startswith("#") for name, value in attrs if name == "href")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_says_what_was_read(tmp_path: Path) -> None:
    """The log, the number of records, what is no record, who used what, and what is not known."""
    log = write_log(tmp_path / "audit.jsonl", [*Run().make_records(), *Run(ticks=2, has_end=False).make_records()])
    log.write_text(f"{log.read_text()}nonsense\n")
    page = make_html(log, LineTally())
    for text in (
        str(log),
        "5 records",
        "1 line is not",
        "alice",
        "GPU-a0fa4e0",
        "4.0 GiB of 8.0 GiB (50%)",
        "2025-11-03 00:00",
    ):
        assert text in page
    assert "1 process has no recorded end" in page


def test_a_log_without_records(tmp_path: Path) -> None:
    """A page is made of nothing, too, and says so."""
    page = make_html(write_log(tmp_path / "audit.jsonl", []))
    assert "No process created a device on a GPU." in page
    assert "0 records" in page


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """Whatever stands in a log, the page has no script, no handler, no address, and no character that turns writing."""
    page = make_html(make_hostile_log(tmp_path / "audit.jsonl"))
    found = Collector()
    found.feed(page)
    assert not found.tags & {"script", "img", "iframe", "foreignobject", "object", "link", "form", "base"}
    assert not [name for name in found.attributes if name.startswith("on") or name in {"src", "style"}]
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\ud800-\udfff]", page)
    assert "alert(1)" in "".join(found.texts)


def test_nothing_may_be_fetched_or_run(tmp_path: Path) -> None:
    """The page's own policy for browsers forbids scripts and requests, and every style but its own."""
    page = make_html(write_log(tmp_path / "audit.jsonl", Run().make_records()))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/=]+'; base-uri 'none'; form-action 'none'", policy[1]
    )
    addresses = set(re.findall(r"https?://[^\"' <]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched


def test_the_page_stays_small(tmp_path: Path) -> None:
    """Many GPUs, users, causes and long names do not make it larger than 5 MB."""
    records = []
    for number in range(6000):
        name = f"\u202e{'<&' * 150}{number % 400}"
        device = make_device(f"{name}{number % 97}", peak=GIB // 9)
        who = {"user": name, "script": f"/{name}", "host": name, "job": {"id": name}, "start_ticks": number}
        begin = MONDAY + number * 3_000_000
        choice = {"waited_ms": 70_000 + number, "lease": "x", "allocations": []}
        records += [
            make_record("clamped", begin, devices=[device], cut=[f"{name}{number}"], choice=choice, **who),
            make_record("ended", begin + 40_000_000, devices=[device], duration_ms=40_000_000, **who),
        ]
    assert len(make_html(write_log(tmp_path / "audit.jsonl", records)).encode()) < 5_000_000


def test_what_is_not_drawn_is_said(tmp_path: Path) -> None:
    """More processes than there are bars are drawn together, and counted."""
    found = [Run(ticks=number, begin=number * 60_000, length=50_000) for number in range(100)]
    page = make_html(write_log(tmp_path / "log", [record for run in found for record in run.make_records()]))
    assert "60 processes are drawn as steps" in page


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0.0 s"),
        (999, "1.0 s"),
        (59_999, "59 s"),
        (90_000, "1 min 30 s"),
        (3_600_000, "1 h 0 min"),
        (90_000_000, "1 d 1 h"),
    ],
)
def test_times_for_people(ms: int, text: str) -> None:
    """A time has two units at most."""
    assert format_ms(ms) == text


def test_names_for_people() -> None:
    """A GPU is named by host and the begin of its UUID, a process by user, program and job."""
    assert name_gpu("gpu1", "GPU-a0fa4e00-0000", "NVIDIA A10") == "gpu1 GPU-a0fa4e00 (NVIDIA A10)"
    assert name_gpu("gpu1", "0") == "gpu1 GPU 0"
    assert name_gpu("gpu1", "") == "gpu1 all GPUs"
    assert name_process("alice", "/home/alice/train.py", "14") == "alice train.py, job 14"
    assert name_process("alice", "", "") == "alice (no script)"
    assert show("a\u202eb\n") == r"a\u202eb\n"
    assert count(1, "log", "logs") == "1 log"
