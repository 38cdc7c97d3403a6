"""The page in a browser: from the disk, without a network, at the width of a desk and of a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.audit.report.records import Run, write_log
from tests.audit.report.test_page import HOSTILE, make_hostile_log, make_html
from tests.test_site import FIND_CLIPPED

pytestmark = pytest.mark.exhaustive
pytest.importorskip("msgspec", reason="of the extra report")
pytest.importorskip("vl_convert", reason="of the extra report")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(name="browser", scope="module")
def fixture_browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(name="page_file", scope="module")
def fixture_page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a week with three users and two GPUs."""
    folder = tmp_path_factory.mktemp("page")
    found = [
        Run(
            ticks=number, user=("alice", "bob", "a.name.that.is.rather.long")[number % 3], begin=number * 3_700_000,
            length=(number % 5 + 1) * 4_000_000, host=f"gpu{number % 2}", waited_ms=number * 1000, clamps=number % 3,
        )
        for number in range(160)
    ]  # fmt: skip
    log = write_log(folder / "audit.jsonl", [record for run in found for record in run.make_records()])
    (folder / "report.html").write_text(make_html(log), encoding="utf-8")
    return folder / "report.html"


def open_page(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """Open a page, and return it with all that it said, asked for or tried to run."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    heard: list[str] = []

    def note_dialog(dialog: Any) -> None:
        heard.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", lambda message: heard.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", note_dialog)
    page.on("request", lambda request: heard.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    assert heard.pop(0) == f"request: {path.as_uri()}"
    return page, heard


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_or_fetched(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    """The page loads from the disk without an error or a request, and is no wider than the window, its tables open."""
    page, heard = open_page(browser, page_file, width, scheme)
    assert heard == []
    for summary in page.query_selector_all("details:not([open]) > summary"):
        summary.click()
    assert page.evaluate(FIND_CLIPPED) == []
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0


def test_figures_are_seen_and_told(browser: Any, page_file: Path) -> None:
    """One of the two layouts is shown, each figure has a name for screen readers, and each bar a tooltip."""
    for width, shown, hidden in ((1280, "wide", "narrow"), (400, "narrow", "wide")):
        page, _ = open_page(browser, page_file, width)
        assert all(box.is_visible() for box in page.query_selector_all(f".{shown} svg"))
        assert not any(box.is_visible() for box in page.query_selector_all(f".{hidden} svg"))
        names = page.eval_on_selector_all(f".{shown} svg", "all => all.map(one => one.getAttribute('aria-label'))")
        assert len(names) >= 5
        assert all(names)
        assert page.evaluate(f"document.querySelectorAll('#timeline .{shown} path > title').length") > 100


def test_a_keyboard_opens_the_tables(browser: Any, page_file: Path) -> None:
    """Whoever has no mouse gets to each table with Tab, and opens it with Enter."""
    page, _ = open_page(browser, page_file, 1280)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").startswith("Table: GPUs"):
            break
    page.keyboard.press("Enter")
    assert "gpu0" in page.inner_text("#timeline details[open]")


@pytest.mark.parametrize("width", [1280, 400])
def test_hostile_names_do_nothing(browser: Any, tmp_path: Path, width: int) -> None:
    """No name of a user, host, program, job, GPU or cause runs, asks for something, or breaks the page."""
    html = make_html(make_hostile_log(tmp_path / "audit.jsonl"))
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    page, heard = open_page(browser, file, width)
    for summary in page.query_selector_all("details:not([open]) > summary"):
        summary.click()
    page.mouse.move(200, 600)
    page.wait_for_timeout(200)
    assert heard == []
    assert page.evaluate("document.scripts.length + document.images.length + frames.length") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(HOSTILE) == len(page.query_selector_all("#timeline details table")[0].query_selector_all("tbody tr"))


def test_a_script_would_be_noticed(browser: Any, page_file: Path, tmp_path: Path) -> None:
    """Even if a script got into the page, the page's policy stops it, and these tests hear of it."""
    file = tmp_path / "report.html"
    text = page_file.read_text(encoding="utf-8")
    file.write_text(text.replace("</body>", "<script>alert(1)</script><img src='http://127.0.0.1:9/x'></body>"))
    _, heard = open_page(browser, file, 1280)
    assert [text for text in heard if "Content Security Policy" in text]
    assert not [text for text in heard if text.startswith("dialog")]


def test_it_prints(browser: Any, page_file: Path, tmp_path: Path) -> None:
    """Printed, it has the wide figures on paper's white, and no tables."""
    page, _ = open_page(browser, page_file, 1280, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper')").strip() == "#fff"
    assert not any(table.is_visible() for table in page.query_selector_all("table"))
    page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
