"""The documentation site: every page is there, and reads well in a browser, from the disk and without a network.

The tests in a browser need playwright, of the development group, and Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli

import tfenv
from tests.pages import DOCS, ROOT, Block, blocks

yaml: Any = pytest.importorskip("yaml", reason="of the development group")

CONFIG = ROOT / "mkdocs.yml"
INDEX = ROOT / "docs" / "index.md"
WIDTHS = (1280, 400)


# ---- what mkdocs.yml and the sources say


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Of mkdocs.yml: the names of Python functions in it are mkdocs' business."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda _loader, suffix, _node: suffix)


def nav_pages(entries: list[Any]) -> list[str]:
    found: list[str] = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += nav_pages(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_navigation() -> None:
    """Each page in docs/ is in the navigation once, and each entry is a page."""
    config = yaml.load(CONFIG.read_text(encoding="utf-8"), Loader=_Loader)
    pages = [str(page.relative_to(ROOT / "docs")) for page in DOCS]
    assert sorted(nav_pages(config["nav"])) == sorted(pages)


def test_the_first_page_says_what_is_supported() -> None:
    """The first page has the version, how to install, the repository, and what the package supports."""
    text = INDEX.read_text(encoding="utf-8")
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = [name.rpartition(" ")[2] for name in project["classifiers"] if ":: Python :: 3." in name]
    assert f"| Version | {tfenv.__version__} " in text
    assert f"| Python | {pythons[0]} to {pythons[-1]} |" in text
    rows = set(re.findall(r"^\| ([\w ]+\w) ", text, re.MULTILINE))
    assert {"Version", "Repository", "Operating system", "Python", "TensorFlow", "GPUs"} <= rows
    assert "$ pip install ." in text


def starts_in_lower_case(page: Path) -> list[str]:
    """The lines after a block that go on with the sentence before it."""
    text = page.read_text(encoding="utf-8")
    without_fences = re.sub(r"^```\w*\n.*?^```$", "    …", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^ {4}.*\n\n?(?!tfenv|pip)([a-z].*)", without_fences, re.MULTILINE)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_goes_on_after_a_block(page: Path) -> None:
    """After a block of code a new sentence begins."""
    assert starts_in_lower_case(page) == []


def test_a_sentence_that_goes_on_is_noticed(tmp_path: Path) -> None:
    """After a fence and after an indented block, and not when a name in backticks begins the sentence."""
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n$ ls\n```\n\nlists.\n\n    $ ls\n\nshows.\n\n```text\n```\n\n`ls` lists.\n", encoding="utf-8"
    )
    assert starts_in_lower_case(page) == ["lists.", "shows."]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_in_console_blocks(page: Path) -> None:
    """A copy button leaves out prompts and output only in a `console` block, and each of those shows a command."""
    text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^ {4}\S*\$ .*", text, re.MULTILINE) == []
    for block in blocks(pages=[page]):
        assert bool(typed_lines(block)) is (block.language == "console"), str(block)


def typed_lines(block: Block) -> list[str]:
    """What a reader types: the lines at a prompt, and those that continue them."""
    typed = re.findall(r"^(?:[a-z]+@\w+\S*)?\$ ((?:.*\\\n)*.*)$", block.text, re.MULTILINE)
    return [line for command in typed for line in command.split("\n")]


# ---- the built site


@pytest.fixture(name="site", scope="module")
def fixture_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install --group docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def html_page(site: Path, page: Path) -> Path:
    return (site / page.relative_to(ROOT / "docs")).with_suffix(".html")


def test_the_site_has_every_page(site: Path) -> None:
    """mkdocs builds the pages without a warning, links and anchors included."""
    for page in DOCS:
        assert html_page(site, page).is_file()


def test_the_site_fetches_nothing(site: Path) -> None:
    """A reader without a network misses nothing: no script, style, font or image comes from elsewhere."""
    element = r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>"
    fetched = re.compile(rf"{element}|@import\s+url|url\(https?:")
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > len(DOCS)
    found = {(path.name, match[0]) for path in files for match in fetched.finditer(path.read_text(encoding="utf-8"))}
    assert found == set()


def test_notes_are_boxes(site: Path) -> None:
    """`> [!NOTE]`, which the repository's web view shows as a box, is one in the site, too."""
    pages = [page for page in DOCS if "> [!" in page.read_text(encoding="utf-8")]
    assert len(pages) >= 2
    for page in pages:
        text = html_page(site, page).read_text(encoding="utf-8")
        assert text.count('<div class="admonition ') == page.read_text(encoding="utf-8").count("> [!")
        assert "[!" not in text


def test_pages_have_a_previous_and_a_next(site: Path) -> None:
    """At the foot of each page are links to its neighbours in the navigation."""
    text = html_page(site, ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert len(re.findall(r'class="md-footer__link md-footer__link--(?:prev|next)"', text)) == 2


# ---- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

#: What is cut off at the right edge, or must be scrolled to. A closed drawer is not in sight.
FIND_CLIPPED = """() => {
  const found = document.documentElement.scrollWidth > innerWidth ? ["the page"] : []
  for (const element of document.querySelectorAll("body *")) {
    const seen = element.textContent.trim() && !element.closest(".md-sidebar--primary, .md-search, [hidden]")
    const style = getComputedStyle(element)
    if (!seen || style.display === "inline" || !element.checkVisibility({ visibilityProperty: true })) continue
    const hidden = style.overflowX !== "visible" && element.scrollWidth > element.clientWidth + 1
    const box = element.getBoundingClientRect()
    if (hidden || (box.width > 1 && box.right > innerWidth + 1))
      found.push(`${element.tagName} ${element.className}: ${element.textContent.trim().slice(0, 60)}`)
  }
  return found
}"""


@pytest.fixture(name="browser", scope="module")
def fixture_browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install --group dev"
    )
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        yield browser
        browser.close()


def open_page(browser: Any, path: Path, width: int = 1280) -> Any:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off(site: Path, browser: Any, width: int) -> None:
    """No page is wider than the window, and no text on it must be scrolled to sideways."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    clipped = {}
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        clipped[path.name] = page.evaluate(FIND_CLIPPED)
    assert len(clipped) > len(DOCS)
    assert {name: found for name, found in clipped.items() if found} == {}


def test_what_is_cut_off_is_noticed(site: Path, browser: Any) -> None:
    """A line that cannot be broken is found, and so is one that is hidden in a box."""
    page = open_page(browser, site / "index.html", 400)
    assert page.evaluate(FIND_CLIPPED) == []
    page.add_style_tag(content=".md-typeset pre > code { white-space: pre; overflow-wrap: normal; overflow: auto }")
    assert any("python train.py" in found for found in page.evaluate(FIND_CLIPPED))


def test_the_search_works_from_the_disk(site: Path, browser: Any) -> None:
    """Somebody who opens the built page as a file and types a word gets the pages that have it."""
    page = open_page(browser, site / "recipes" / "slurm.html")
    page.click("input.md-search__input")
    page.keyboard.type("prometheus")
    # Results also come while the word is being typed. Only those for the whole word have it in their addresses.
    link = page.wait_for_selector(".md-search-result__link[href*='audit.html?h=prometheus']", timeout=20_000)
    assert link is not None
    with page.expect_navigation(wait_until="load"):
        link.click()
    assert "prometheus" in page.inner_text("article").lower()


def test_a_copy_button_copies_what_is_typed(site: Path, browser: Any, exhaustive: bool) -> None:
    """The button of a console block puts its commands, all their lines, and nothing else into the clipboard."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    for source in DOCS if exhaustive else DOCS[::4]:
        shown = blocks("console", pages=[source])
        page.goto(html_page(site, source).as_uri())
        assert copy_blocks(page) == ["\n".join(typed_lines(block)) for block in shown], source


def copy_blocks(page: Any) -> list[str]:
    """Press each button, and paste into a field."""
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<textarea id=field></textarea>')")
    field, copied = page.query_selector("#field"), []
    for button in page.query_selector_all(".language-console [data-clipboard-target]"):
        field.fill("")
        button.dispatch_event("click")
        field.focus()
        page.keyboard.press("Control+V")
        copied.append(field.input_value())
    return copied
