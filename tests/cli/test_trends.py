"""Sparklines of `--watch`: how a value went, in the width that is left."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.cli.conftest import run_on_terminal
from tfenv.cli.trends import Trends, choose_levels
from tfenv.simulate.environment import build_environment, parse_gpus


def test_newest_at_the_right() -> None:
    """Each sample is a block from nothing to all, the newest at the right. What is not told is a gap."""
    trends = Trends()
    for sample in (0.0, 0.5, None, 1.0, 7.0, -1.0):
        trends.add({"memory 0": sample})
    assert trends.draw("memory 0", 8) == "  ▁▅ ██▁"
    assert trends.draw("memory 0", 3) == "██▁"
    assert trends.draw("memory 1", 3) == "   "


def test_what_is_gone_is_forgotten() -> None:
    """A process that ended leaves no samples for one that gets its number."""
    trends = Trends()
    trends.add({"0 100 1": 1.0})
    trends.add({})
    trends.add({"0 100 1": 0.0})
    assert trends.draw("0 100 1", 3) == "  ▁"


@pytest.mark.parametrize(
    ("encoding", "terminal", "first"),
    [("utf-8", "xterm-256color", "▁"), ("ascii", "xterm", "_"), ("latin-1", "xterm", "_"), ("utf-8", "linux", "_")],
)
def test_ascii_where_blocks_cannot_be_shown(
    monkeypatch: pytest.MonkeyPatch, encoding: str, terminal: str, first: str
) -> None:
    """A locale or a console without the blocks gets ASCII."""
    monkeypatch.setenv("TERM", terminal)
    assert choose_levels(io.TextIOWrapper(io.BytesIO(), encoding=encoding))[0] == first


@pytest.mark.parametrize(
    ("columns", "locale", "expected"),
    [("160", "C.UTF-8", "▂"), ("80", "C.UTF-8", "▂"), ("40", "C.UTF-8", ""), ("100", "C", ".")],
)
def test_on_a_terminal(
    variables: dict[str, str], project: Path, tmp_path: Path, columns: str, locale: str, expected: str
) -> None:
    """`gpus --watch` has sparklines on a terminal that is wide enough, and in ASCII where the locale knows no more."""
    held = tmp_path / "held"
    held.write_text("0 1 4096\n")
    env = variables | build_environment(parse_gpus("1x24GiB"), processes=held, base={})
    env |= {
        "COLUMNS": columns,
        "LC_ALL": locale,
        "TERM": "xterm-256color",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    said, code = run_on_terminal(["gpus", "--watch", "0.1"], env, project, "24.0 GiB" if expected else "GPU")
    assert code == 130
    assert ("trend" in said) is bool(expected)
    assert expected in said
    assert "Traceback" not in said


def test_once_there_is_nothing_to_compare(variables: dict[str, str], project: Path) -> None:
    """Without `--watch` there are no sparklines."""
    env = variables | build_environment(parse_gpus("1x24GiB"), base={}) | {"COLUMNS": "160"}
    said, _ = run_on_terminal(["gpus"], env, project)
    assert "trend" not in said
