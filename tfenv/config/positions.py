"""Where every key of a TOML text stands.

No well-kept TOML library tells positions and reads the whole of TOML: tomli and tomllib return plain values,
tomlkit keeps layout but no lines. So this scanner runs beside tomli, over texts that tomli has accepted. It knows
how far a key, a string, a table reach, and nothing of what values mean. It never raises: at something that is not
TOML it stops, and the keys before it keep their positions.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right

from tfenv.policy.model import KeyPath

#: Keys below so many levels get no position. A document has 32, and a table of a pyproject.toml stands two lower.
#: Without a bound, 256 KiB of dots would cost gigabytes.
DEEPEST = 34

#: White space, line ends and comments: what may stand between any two parts.
_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
#: One part of a dotted key, quoted or bare.
_KEY_PART = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|[^\s.=\[\]{}"\'#,]+')
_DOT = re.compile(r"[ \t]*\.[ \t]*")
#: A value that holds no others. A multi-line string may end in up to two quotes of its own before the closing
#: three. A date may hold a space.
_SCALAR = re.compile(
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
    r"|[^\[\]{},#\"'\s][^\[\]{},#\"'\n]*",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|x([0-9A-Fa-f]{2})|(.))")
_ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b"}


def locate_keys(text: str) -> dict[KeyPath, tuple[int, int]]:
    """Return line and column of every key and array element of a TOML text, both 1-based and in characters.

    A key's position is where it is written as itself: in its header, or before its "=". A table that is only part of
    longer keys has the position of the first of them. An array element's position is where its value begins. That of
    an element of an array of tables is where its header names it.
    """
    scanner = _KeyScanner(text)
    scanner.scan()
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    return {path: _find_line_and_column(line_starts, offset) for path, offset in scanner.offsets.items()}


def _find_line_and_column(line_starts: list[int], offset: int) -> tuple[int, int]:
    line = bisect_right(line_starts, offset)
    return line, offset - line_starts[line - 1] + 1


class _NotTomlError(Exception):
    """The scan ends here."""


class _OpenContainer:
    """An array or inline table whose end has not come yet."""

    def __init__(self, path: KeyPath, *, array: bool) -> None:
        self.path = path
        self.array = array
        self.elements = 0


class _KeyScanner:
    """Goes through the text once, without recursion: a text of brackets alone must not exhaust the stack."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.offsets: dict[KeyPath, int] = {}
        self.table: KeyPath = ()
        self.open: list[_OpenContainer] = []
        #: Number of elements so far of each array of tables.
        self.lengths: dict[KeyPath, int] = {}

    def scan(self) -> None:
        try:
            while self._skip_blank():
                if self.open:
                    self._scan_inside(self.open[-1])
                elif self._peek() == "[":
                    self._scan_header()
                else:
                    self._scan_key_and_value(self.table)
        except _NotTomlError:
            return

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _skip_blank(self) -> bool:
        """Skip what may stand between two parts. Return whether anything is left."""
        self._take(_BLANK)
        return self.at < len(self.text)

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise _NotTomlError
        self.at = match.end()
        return match.group()

    def _scan_inside(self, container: _OpenContainer) -> None:
        """Scan one element, one key and value, one comma, or the end of an array or inline table."""
        if self._peek() == ("]" if container.array else "}"):
            self.open.pop()
            self.at += 1
        elif self._peek() == ",":
            self.at += 1
        elif container.array:
            path = _extend_path(container.path, container.elements)
            container.elements += 1
            self._record(path, self.at)
            self._scan_value(path)
        else:
            self._scan_key_and_value(container.path)

    def _scan_header(self) -> None:
        array = self.text.startswith("[[", self.at)
        self.at += 2 if array else 1
        self._skip_blank()
        path, offset = self._scan_key(())
        if array:
            index = self.lengths.get(path, 0)
            self.lengths[path] = index + 1
            self._record_if_new(path, offset)
            path = _extend_path(path, index)
        self._record(path, offset)
        self.table = path
        self._skip_blank()
        self.at += 2 if array else 1

    def _scan_key_and_value(self, table: KeyPath) -> None:
        path, offset = self._scan_key(table)
        self._record(path, offset)
        self._skip_blank()
        if self._peek() != "=":
            raise _NotTomlError
        self.at += 1
        self._skip_blank()
        self._scan_value(path)

    def _scan_key(self, table: KeyPath) -> tuple[KeyPath, int]:
        """Return the path of a dotted key, and where its last part begins. Parents without a position get one."""
        path = table
        while True:
            offset = self.at
            path = _extend_path(path, _unquote(self._take(_KEY_PART)))
            if _DOT.match(self.text, self.at) is None:
                return path, offset
            self._take(_DOT)
            self._record_if_new(path, offset)
            # Below an array of tables, a key speaks of its last element.
            if path in self.lengths:
                path = _extend_path(path, self.lengths[path] - 1)

    def _record(self, path: KeyPath, offset: int) -> None:
        if len(path) <= DEEPEST:
            self.offsets[path] = offset

    def _record_if_new(self, path: KeyPath, offset: int) -> None:
        if path not in self.offsets:
            self._record(path, offset)

    def _scan_value(self, path: KeyPath) -> None:
        if self._peek() in ("[", "{"):
            self.open.append(_OpenContainer(path, array=self._peek() == "["))
            self.at += 1
        else:
            self._take(_SCALAR)


def _extend_path(path: KeyPath, part: str | int) -> KeyPath:
    """Return the path one level down, as long as anybody will ask for it."""
    return (*path, part) if len(path) <= DEEPEST else path


def _unquote(part: str) -> str:
    """Return the key itself, without quotes and escapes."""
    if part.startswith("'"):
        return part[1:-1]
    if part.startswith('"'):
        return _ESCAPE.sub(_unescape, part[1:-1])
    return part


def _unescape(match: re.Match[str]) -> str:
    digits = match[1] or match[2] or match[3]
    if digits is None:
        return _ESCAPED.get(match[4], match[4])
    code_point = int(digits, 16)
    return chr(code_point) if code_point <= sys.maxunicode else match[0]
