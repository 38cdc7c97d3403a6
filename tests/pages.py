"""What the README and the pages in docs/ show: blocks, command lines, policies, and worked examples."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("docs/**/*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted(ROOT.glob("sample_configs/**/*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
#: A line that is typed at a prompt: `$`, `alice@gpu1$`, `alice@gpu1:/srv/vision$`; also in a block that is indented.
_PROMPT = re.compile(r"^(?: {4})?(?:(?P<user>[a-z]+)@\w+(?::(?P<folder>\S+))?)?\$ (?P<line>.+)$")
#: A command with options in a sentence or a table.
_INLINE = re.compile(r"`(tfgpu [^`\n…]+ -[^`\n…]+)`")
_ASSIGNMENT = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)
_SEPARATORS = {"|", "||", "&&", ";", "&", ">", ">>", "<"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: Where it stands.
        line: Of its first fence, 1-based.
        language: What follows the fence; "" when nothing does.
        text: What is inside.
        section: The heading above it.
    """

    page: Path
    line: int
    language: str
    text: str
    section: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line that is shown at a prompt.

    Attributes:
        words: Program and arguments, up to a pipe or a redirection.
        variables: Set in front of it.
        user: Named by the prompt; "" when it names none.
        folder: The working directory that the prompt names; "" when it names none.
        output: The lines below it.
        background: It goes on running, beside those that follow.
    """

    words: tuple[str, ...]
    variables: dict[str, str]
    user: str = ""
    folder: str = ""
    output: tuple[str, ...] = ()
    background: bool = False


def blocks(*languages: str, pages: Sequence[Path] = PAGES) -> list[Block]:
    """All fenced blocks of these languages; without one, all."""
    found = [block for page in pages for block in _blocks_of(page)]
    return [block for block in found if not languages or block.language in languages]


def _blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    inside = [match.span() for match in _FENCE.finditer(text)]
    # A comment in a block is no heading.
    headings = [h for h in _HEADING.finditer(text) if not any(start < h.start() < end for start, end in inside)]
    for match in _FENCE.finditer(text):
        above = [heading[1] for heading in headings if heading.start() < match.start()]
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match[1], match[2], above[-1] if above else "")


# ---- command lines


def commands(text: str) -> list[Command]:
    """The command lines at prompts, each with its output."""
    lines = text.replace("\\\n", " ").splitlines()
    prompts = [(number, match) for number, line in enumerate(lines) if (match := _PROMPT.match(line))]
    ends = [*(number for number, _ in prompts), len(lines)][1:]
    return [
        _command(match["line"], match["user"] or "", match["folder"] or "", lines[number + 1 : end])
        for (number, match), end in zip(prompts, ends, strict=False)
    ]


def script_commands(text: str) -> list[Command]:
    """The command lines of a shell script, comments and blank lines left out."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [_command(line, "", "", ()) for line in lines if line.startswith(("tfgpu ", "sudo tfgpu ", "exec tfgpu "))]


def _command(line: str, user: str, folder: str, output: Sequence[str]) -> Command:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = list(lexer)
    stop = next((number for number, word in enumerate(words) if word in _SEPARATORS), len(words))
    variables: dict[str, str] = {}
    rest = [word for word in words[:stop] if word != "sudo"]
    while rest and (match := _ASSIGNMENT.fullmatch(rest[0])):
        variables[match[1]] = match[2]
        del rest[0]
    return Command(tuple(rest), variables, user, folder, tuple(output), background=words[-1:] == ["&"])


def all_commands(pages: Sequence[Path] = PAGES) -> Iterator[tuple[str, Command]]:
    """Every command line that is shown, at a prompt, in a script or in a sentence, with its page."""
    for page in pages:
        for command in commands(page.read_text(encoding="utf-8")):
            yield str(page.relative_to(ROOT)), command
    for block in blocks("bash", "sh", pages=pages):
        for command in script_commands(block.text):
            yield str(block), command
    for page in pages:
        for text in _INLINE.findall(page.read_text(encoding="utf-8")):
            yield str(page.relative_to(ROOT)), _command(text, "", "", ())


# ---- policies


def file_name(block: Block) -> str:
    """The file a TOML block stands for, as its first line says: `# tfgpu.toml, in the root of a project`."""
    first = block.text.partition("\n")[0]
    return first.removeprefix("# ").split(",")[0] if first.startswith("# ") else ""
