"""Draw the pictures of docs/assets/pictures from real runs: terminals, and the chart of the demo.

    python tools/pictures.py                    draws all
    python tools/pictures.py explain gpus       draws these
    python tools/pictures.py --check            exits with status 1 if one of them is out of date

The GPUs are simulated, so every machine draws the same. The diagrams policy.svg and start-up.svg
are drawn by hand.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from tfenv.policy.units import format_bytes
from tfenv.simulate.environment import build_environment, parse_gpus

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "assets" / "pictures"
#: Four processes of three users, as `tfgpu audit` reads them.
AUDIT_LOG = ROOT / "tools" / "pictures_audit.jsonl"
MACHINE_LAYER = Path("/etc/tfgpu")
MIB = 1 << 20

#: Another's processes on the simulated GPUs: GPU, process id, MiB.
OTHERS = "1 4711 9000\n2 4712 21000\n"
USER_POLICY = '[ceiling]\nmemory_limit = "50%"\n'
POLICY = '[gpu]\nvisible_devices = [0]\nmemory_growth = true\nmemory_limit = "16GiB"\n'
MISTAKEN_POLICY = '[gpu]\nvisible_devices = [0]\nmemory_groth = true\nmemory_limit = "8 gigs"\n'

# A dark terminal with a border is readable on a light and on a dark page. No font is fetched.
COLOURS = TerminalTheme(
    (22, 27, 34),
    (230, 237, 243),
    [
        (72, 79, 88),
        (255, 123, 114),
        (63, 185, 80),
        (210, 153, 34),
        (121, 192, 255),
        (210, 168, 255),
        (86, 212, 221),
        (230, 237, 243),
    ],
)
TERMINAL = """\
<svg xmlns="http://www.w3.org/2000/svg" width="DISPLAY_WIDTH" viewBox="0 0 {width} {height}" role="img">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
CHART = """\
<svg xmlns="http://www.w3.org/2000/svg" width="724" height="{height}" viewBox="-16 -16 724 {height}" role="img"
 aria-labelledby="title desc">
<title id="title">GPU memory that TensorFlow takes, without a policy and with tfgpu.toml</title>
<desc id="desc">{description}</desc>
<style>
.page {{ fill: #ffffff; stroke: #d1d9e0; }}
text {{ font: 15px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }}
.head {{ font-size: 19px; font-weight: bold; }}
.group {{ font-weight: bold; }}
.faint {{ fill: #59636e; }}
.value {{ font-weight: bold; }}
.card {{ fill: none; stroke: #818b98; }}
.without {{ fill: #bc4c00; }}
.governed {{ fill: #0969da; }}
@media (prefers-color-scheme: dark) {{
  .page {{ fill: #0d1117; stroke: #3d444d; }}
  text {{ fill: #f0f6fc; }}
  .faint {{ fill: #9198a1; }}
  .without {{ fill: #f0883e; }}
  .governed {{ fill: #58a6ff; }}
}}
</style>
<rect x="-15.5" y="-15.5" width="723" height="{frame}" rx="8" class="page"/>
{body}
</svg>
"""
#: Pixels on a page, so that the text of all terminals has one size. A narrower page makes them smaller.
COLUMN_WIDTH = 8
BAR_LEFT, BAR_WIDTH, BAR_HEIGHT, ROW = 78, 500, 18, 27


@dataclass(frozen=True)
class Shell:
    """A home directory with a project in it, on a machine with four simulated GPUs."""

    home: Path

    @property
    def project(self) -> Path:
        return self.home / "vision"

    def write_policy(self, text: str) -> None:
        (self.project / "tfgpu.toml").write_text(text, encoding="utf-8")

    def run(self, command: Sequence[str | Path], columns: int, folder: Path | None = None) -> str:
        """Run a command in a terminal, and return what it shows, with its colours."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        variables = {**kept, "HOME": str(self.home), "TERM": "xterm-256color", "TZ": "UTC", "COLUMNS": str(columns)}
        places = {"XDG_CONFIG_HOME": self.home / ".config", "XDG_STATE_HOME": self.home / ".local" / "state"}
        base = variables | {name: str(path) for name, path in places.items()} | {"PYTHONPATH": str(ROOT)}
        env = build_environment(parse_gpus("4x24GiB:NVIDIA A10"), processes=self.home / "others", base=base)
        reader, writer = pty.openpty()
        with subprocess.Popen([*map(str, command)], cwd=folder or self.project, env=env, stdout=writer, stderr=writer):
            os.close(writer)
            output = b"".join(iter(lambda: read_terminal(reader), b""))
        os.close(reader)
        return output.decode().replace("\r\n", "\n")

    def run_tfgpu(self, *arguments: str, columns: int = 80) -> str:
        """Run `tfgpu`, and return the command and what it shows, without what is this machine's own."""
        shown = self.run([sys.executable, "-m", "tfenv", *arguments], columns)
        shown = re.sub(r"(?<= of )\S+ in .*", "alice in ~/vision", shown, count=1)
        shown = re.sub(r"(?<=Groups: )[^\x1b\n]*", "alice, students", shown).replace(str(self.home), "~")
        return f"\x1b[1;32m$\x1b[0m \x1b[1mtfgpu {' '.join(arguments)}\x1b[0m\n{shown}"


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # on Linux the end of a terminal is EIO
        return b""


@contextmanager
def open_shell() -> Iterator[Shell]:
    if MACHINE_LAYER.exists():
        raise SystemExit(f"{MACHINE_LAYER} exists: the pictures would show this machine's policy")
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(Path(folder).resolve())
        shell.project.mkdir()
        (shell.home / "others").write_text(OTHERS, encoding="utf-8")
        (shell.home / ".config" / "tfgpu").mkdir(parents=True)
        (shell.home / ".config" / "tfgpu" / "tfgpu.toml").write_text(USER_POLICY, encoding="utf-8")
        yield shell


@functools.cache
def run_demo() -> tuple[str, str]:
    """Run the demo once, and return its line and table as shown, and its figures as JSON."""
    with open_shell() as shell:
        figures = shell.home / "figures.json"
        (shell.home / "others").write_text("", encoding="utf-8")
        (shell.home / ".config" / "tfgpu" / "tfgpu.toml").unlink()
        script = ROOT / "sample_configs" / "demo" / "compare.py"
        shown = shell.run([sys.executable, script, "--simulated", "--figures", figures], columns=80)
        found = re.search(r"^tfgpu: .*(?=^The policy was kept)", shown, re.MULTILINE | re.DOTALL)
        if found is None or not figures.exists():
            raise SystemExit(f"the demo failed:\n{shown}")
        return found[0], figures.read_text(encoding="utf-8")


def draw_terminal(name: str, text: str) -> str:
    """Draw what a terminal shows, as wide as its longest line."""
    shown = Text.from_ansi(text.rstrip() + "\n ")  # the last line would lose what is below its base line
    columns = max(76, *(line.cell_len for line in shown.split()))
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(shown, soft_wrap=True, highlight=False, end="")
    template = TERMINAL.replace("DISPLAY_WIDTH", str(columns * COLUMN_WIDTH))
    picture = console.export_svg(title="", theme=COLOURS, code_format=template, unique_id=name)
    return "\n".join(line.strip() for line in picture.splitlines() if line.strip()) + "\n"


def draw_demo() -> str:
    prompt = "\x1b[1;32m$\x1b[0m \x1b[1mmake demo\x1b[0m\n"
    return draw_terminal("demo", prompt + run_demo()[0])


def draw_explain() -> str:
    with open_shell() as shell:
        shell.write_policy(POLICY)
        return draw_terminal("explain", shell.run_tfgpu("explain", columns=100))


def draw_gpus() -> str:
    with open_shell() as shell:
        shell.write_policy(POLICY)
        return draw_terminal("gpus", shell.run_tfgpu("gpus", columns=100))


def draw_check() -> str:
    with open_shell() as shell:
        shell.write_policy(MISTAKEN_POLICY)
        return draw_terminal("check", shell.run_tfgpu("check", columns=100))


def draw_audit() -> str:
    with open_shell() as shell:
        (shell.project / "audit.jsonl").write_bytes(AUDIT_LOG.read_bytes())
        shown = shell.run_tfgpu("audit", "--file", "audit.jsonl", columns=100)
        return draw_terminal("audit", shown.replace(" --file audit.jsonl", "", 1))


def draw_chart() -> str:
    gpus: list[dict[str, int]] = json.loads(run_demo()[1])
    body = ['<text x="0" y="22" class="head">GPU memory that TensorFlow takes for one small Keras model</text>']
    top = 54
    for key, heading in (("without", "Without a policy"), ("governed", "With tfgpu.toml")):
        body.append(f'<text x="0" y="{top}" class="group">{heading}</text>')
        for row, gpu in enumerate(gpus):
            body += draw_bar(key, gpu, top + 12 + row * ROW)
        top += 12 + len(gpus) * ROW + 26
    card = format_size(gpus[0]["memory"])
    body.append(f'<text x="0" y="{top - 8}" class="faint">Each outline is one simulated GPU of {card}.</text>')
    return CHART.format(height=top + 24, frame=top + 23, description=escape(describe(gpus)), body="\n".join(body))


def draw_bar(key: str, gpu: dict[str, int], top: int) -> list[str]:
    middle = top + BAR_HEIGHT - 4
    taken = gpu[key]
    width = max(3, round(BAR_WIDTH * taken / gpu["memory"])) if taken else 0
    style, value = ("value", format_size(taken)) if taken else ("faint", "not used")
    return [
        f'<text x="0" y="{middle}" class="faint">GPU {gpu["gpu"]}</text>',
        f'<rect x="{BAR_LEFT}" y="{top}" width="{width}" height="{BAR_HEIGHT}" class="{key}"/>',
        f'<rect x="{BAR_LEFT}" y="{top}" width="{BAR_WIDTH}" height="{BAR_HEIGHT}" class="card"/>',
        f'<text x="{BAR_LEFT + BAR_WIDTH + 12}" y="{middle}" class="{style}">{value}</text>',
    ]


def describe(gpus: Sequence[dict[str, int]]) -> str:
    """Return the chart in words."""
    parts = [
        ", ".join(f"{format_size(gpu[key])} of GPU {gpu['gpu']}" for gpu in gpus if gpu[key])
        for key in ("without", "governed")
    ]
    return f"Without a policy TensorFlow takes {parts[0]}. With tfgpu.toml it takes {parts[1]}."


def format_size(size: int) -> str:
    return format_bytes(size).replace(".0 ", " ")


DRAW: dict[str, Callable[[], str]] = {
    "demo": draw_demo,
    "demo-chart": draw_chart,
    "explain": draw_explain,
    "gpus": draw_gpus,
    "check": draw_check,
    "audit": draw_audit,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation from real runs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Draw only these: {', '.join(DRAW)}.")
    parser.add_argument("--check", action="store_true", help="Write nothing. Exit with status 1 if one is out of date.")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in DRAW]:
        parser.error(f"no such picture: {', '.join(unknown)}; choose from {', '.join(DRAW)}")
    outdated = []
    for name in args.names or DRAW:
        path, picture = PICTURES / f"{name}.svg", DRAW[name]()
        if args.check and (not path.exists() or path.read_text(encoding="utf-8") != picture):
            outdated.append(path.name)
        elif not args.check:
            path.write_text(picture, encoding="utf-8")
    if outdated:
        print(f"out of date: {', '.join(outdated)}; run `make pictures`")
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
