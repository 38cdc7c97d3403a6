"""One file: opened once, judged by what was opened, parsed, with the position of every key.

The order is the order of trust: kind of file, owner and permissions, size, encoding, syntax. `read` looks at
nothing of a file's content before its owner is known to count. The search for files looks with `peek` whether a
pyproject.toml has a table of ours, whoever owns it, and keeps nothing else of it.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from functools import cached_property

from tfenv.dependencies import import_dependency
from tfenv.errors import Finding, Severity, TfenvError
from tfenv.identity import is_outer_root
from tfenv.policy.model import KeyPath, Source
from tfenv.values import frozen

#: Bytes of the largest file that is read. A policy for a thousand users is a tenth of it.
LARGEST = 256 * 1024
#: Levels of tables and arrays below the policy's own table. The schema needs seven.
DEEPEST = 32
#: As the Linux kernel: more symbolic links than this on the way are taken for a loop.
MOST_LINKS = 40
#: O_NONBLOCK: a FIFO without a writer must not hold us. O_NOCTTY: no terminal may become ours.
OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
#: Reads of a file that is being rewritten in place, before it is given up.
ATTEMPTS = 3


@frozen
class Trust:
    """Tells whose files count.

    Attributes:
        uid: Effective user id: one's own files count.
        owners: Further trusted owners, `trusted_owners` of the machine layer.
        administrator: Who must own the machine layer. Only for a draft of it somebody else than root.
        checked_from: The machine layer's parent directories are checked from here down. Only for a draft it is
            another one than "/": a draft may stand where others can write.
    """

    uid: int
    owners: frozenset[int] = frozenset()
    administrator: int = 0
    checked_from: str = "/"


@frozen
class Document:
    """A file that was read.

    Attributes:
        source: The file.
        data: The policy's own table: the whole document, or [tool.tfgpu] of a pyproject.toml.
        sha256: Of the bytes that were read, in hexadecimal.
        text: The whole file, decoded, without a byte order mark.
        owner: uid of the file's owner. None where there is no file (layer "run").
    """

    source: Source
    data: dict[str, object]
    sha256: str
    text: str
    owner: int | None

    def find_position(self, key: KeyPath) -> tuple[int, int] | None:
        """Return line and column of a key inside `data`, both 1-based and in characters.

        A key that is not there has the position of the nearest parent that is. None if there is no such parent.
        """
        path: KeyPath = (*self.source.table, *key)
        while path:
            if path in self._positions:
                return self._positions[path]
            path = path[:-1]
        return None

    @cached_property
    def _positions(self) -> Mapping[KeyPath, tuple[int, int]]:
        from tfenv.config.positions import locate_keys

        return locate_keys(self.text)


class DocumentError(TfenvError):
    """A file that is left out as a whole.

    Attributes:
        finding: Why. Its code is one of "not-found", "unreadable", "not-a-file", "too-large", "not-utf8",
            "syntax", "too-deep", "wrong-type", "insecure-permissions", "untrusted-owner".
    """

    def __init__(
        self,
        code: str,
        path: str,
        message: str,
        severity: Severity = "error",
        *,
        line: int | None = None,
        column: int | None = None,
    ) -> None:
        self.finding = Finding(code, message, severity, path=path, line=line, column=column)
        super().__init__(str(self.finding))


def read(source: Source, trust: Trust) -> Document:
    """Open, judge and parse one file, or parse the text of a command line.

    Raises:
        DocumentError: The file is left out. Its `finding` says where, why, and what would be right.
    """
    # Late: hashlib loads OpenSSL, and a process may have no policy file at all.
    import hashlib

    raw, owner = _read_trusted_bytes(source, trust)
    text = _decode(source.path, raw)
    data = _select_policy_table(source, _parse(source.path, text))
    _require_shallow(source.path, data)
    return Document(source, data, hashlib.sha256(raw).hexdigest(), text, owner)


def peek(path: str) -> tuple[bytes, int]:
    """Return the bytes of a regular file, whoever owns it, and the owner's uid. Of a large one, `LARGEST` + 1 bytes.

    Raises:
        DocumentError: With the codes "not-found", "unreadable", "not-a-file".
    """
    descriptor = _open(path)
    try:
        opened = os.fstat(descriptor)
        _require_regular(path, opened)
        return _read_up_to(descriptor, LARGEST + 1), opened.st_uid
    except OSError as error:
        raise _make_read_error(path, error) from None
    finally:
        os.close(descriptor)


def peek_text(path: str) -> str:
    """Return a file's text, whoever owns it, to read a policy that is in force for nobody yet: a draft, a checkout.

    What is no UTF-8 is left in it as surrogates, for `read` to report.

    Raises:
        DocumentError: As `peek`.
    """
    return peek(path)[0].decode("utf-8-sig", "surrogateescape")


def _read_trusted_bytes(source: Source, trust: Trust) -> tuple[bytes, int | None]:
    if source.text is not None:
        # Bytes that were no UTF-8 in the environment arrive as surrogates: they fail to decode, as in a file.
        return source.text.encode("utf-8", "surrogatepass"), None
    descriptor = _open(source.path)
    try:
        opened = os.fstat(descriptor)
        _require_regular(source.path, opened)
        _require_trust(source, descriptor, opened, trust)
        return _read_stable(source.path, descriptor), opened.st_uid
    finally:
        os.close(descriptor)


# ---- opening and reading


def _open(path: str) -> int:
    try:
        return os.open(path, OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        raise _make_missing_error(path) from None
    except ValueError:
        raise DocumentError("not-found", path, "no file can have this name") from None
    except OSError as error:
        raise _make_open_error(path, error) from None


def _make_missing_error(path: str) -> DocumentError:
    if os.path.islink(path):
        return DocumentError("not-found", path, "the symbolic link leads nowhere; correct or remove it")
    return DocumentError("not-found", path, "there is no such file; create it or correct the path")


def _make_open_error(path: str, error: OSError) -> DocumentError:
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return DocumentError("not-a-file", path, "is a socket or a device; a policy must be a regular file")
    if error.errno == errno.ELOOP:
        return DocumentError("unreadable", path, "its symbolic links form a loop; correct or remove them")
    if isinstance(error, PermissionError):
        return DocumentError("unreadable", path, "cannot be read by the user of this process; run chmod to allow it")
    return _make_read_error(path, error)


def _make_read_error(path: str, error: OSError) -> DocumentError:
    return DocumentError("unreadable", path, f"cannot be read ({error.strerror}); make it readable or remove it")


def _require_regular(path: str, opened: os.stat_result) -> None:
    mode = opened.st_mode
    if stat.S_ISREG(mode):
        return
    kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    if stat.S_ISDIR(mode):
        kind = "a directory"
    raise DocumentError("not-a-file", path, f"is {kind}; a policy must be a regular file")


def _read_stable(path: str, descriptor: int) -> bytes:
    """Return the whole file, as it was at one moment as far as the file system tells."""
    for _ in range(ATTEMPTS):
        try:
            before = os.fstat(descriptor)
            raw = _read_up_to(descriptor, LARGEST + 1)
            after = os.fstat(descriptor)
        except OSError as error:
            raise _make_read_error(path, error) from None
        if len(raw) > LARGEST:
            raise DocumentError("too-large", path, f"is larger than {LARGEST // 1024} KiB, the most that is read")
        if _is_unchanged(before, after, len(raw)):
            return raw
    raise DocumentError("unreadable", path, "changed while it was read; replace it by renaming a finished copy over it")


def _read_up_to(descriptor: int, most: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    chunks: list[bytes] = []
    while most > 0 and (chunk := os.read(descriptor, most)):
        chunks.append(chunk)
        most -= len(chunk)
    return b"".join(chunks)


def _is_unchanged(before: os.stat_result, after: os.stat_result, size: int) -> bool:
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        return False
    # Some file systems (procfs, a few FUSE ones) call every file empty.
    return after.st_size in (0, size)


# ---- trust


def _require_trust(source: Source, descriptor: int, opened: os.stat_result, trust: Trust) -> None:
    try:
        if source.layer == "machine":
            _require_administrator(source.path, opened, trust)
        else:
            _require_known_owner(source, opened, trust)
            # One's own file in a directory of everybody is a mistake to be told. That of others may have been planted.
            severity: Severity = "error" if source.required or opened.st_uid == trust.uid else "warning"
            _require_not_public(source.path, descriptor, opened, severity)
    except OSError as error:
        raise _make_read_error(source.path, error) from None


def _require_administrator(path: str, opened: os.stat_result, trust: Trust) -> None:
    """Require that the file and every directory on the way to it belong to the administrator alone."""
    for directory, status in _list_directories_to(path):
        if not _is_above(directory, trust.checked_from):
            _require_administrators_own(path, directory, status, trust)
    _require_administrators_own(path, path, opened, trust)


def _require_administrators_own(path: str, place: str, status: os.stat_result, trust: Trust) -> None:
    subject = "it" if place == path else f"its directory {place}"
    if status.st_uid not in (trust.administrator, 0) and not _is_outer_roots(place, status):
        owner = _name_user(trust.administrator)
        message = f"{subject} belongs to {_name_user(status.st_uid)}, not to {owner}; give it to {owner} (chown)"
        raise DocumentError("insecure-permissions", path, message)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "everybody" if status.st_mode & stat.S_IWOTH else "its group"
        message = f"{subject} is writable by {who}; run chmod go-w"
        raise DocumentError("insecure-permissions", path, message)


def _is_outer_roots(place: str, status: os.stat_result) -> bool:
    """Return whether a place belongs to somebody outside of this user namespace, root for one, and not to us."""
    return is_outer_root(status.st_uid) and not os.access(place, os.W_OK, effective_ids=True)


def _is_above(directory: str, bottom: str) -> bool:
    return directory != bottom and (directory == "/" or bottom.startswith(directory + "/"))


def _list_directories_to(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """List every directory that the kernel passes to reach a file, those that symbolic links lead through too.

    From the root down: while everything above belongs to the administrator, nobody else can exchange what
    comes next, so that looking by name is safe.
    """
    here, links = "/", 0
    pending = path.split("/")[::-1]
    yield here, os.lstat(here)
    while pending:
        name = pending.pop()
        if name in ("", "."):
            continue
        # ".." of a path whose links are all followed is the one above.
        there = os.path.dirname(here) if name == ".." else os.path.join(here, name)
        status = os.lstat(there)
        if stat.S_ISLNK(status.st_mode):
            links = _count_link(links, there)
            target = os.readlink(there)
            here = "/" if target.startswith("/") else here
            pending.extend(target.split("/")[::-1])
        elif stat.S_ISDIR(status.st_mode):
            here = there
            yield here, status


def _count_link(links: int, place: str) -> int:
    if links >= MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), place)
    return links + 1


def _require_known_owner(source: Source, opened: os.stat_result, trust: Trust) -> None:
    known = {trust.uid, 0, source.start_owner} | trust.owners
    others = "or root" if source.layer == "site" else "root or the owner of the start directory"
    link = os.lstat(source.path)
    # A stranger's link to my own file would choose for me which of my policies counts.
    owners = [opened.st_uid, link.st_uid] if stat.S_ISLNK(link.st_mode) else [opened.st_uid]
    for owner in owners:
        if owner not in known:
            message = (
                f"belongs to {_name_user(owner)}, not to you ({_name_user(trust.uid)}), {others}; "
                "copy it, or ask your administrator to add the owner to trusted_owners"
            )
            # A stranger who plants a file must not have `on_error` take the GPUs of those who come by. But who names
            # a file in TFGPU_CONFIG or TFGPU_SITE_CONFIG means it.
            severity: Severity = "error" if source.required else "warning"
            raise DocumentError("untrusted-owner", source.path, message, severity)


def _require_not_public(path: str, descriptor: int, opened: os.stat_result, severity: Severity) -> None:
    """Require that not everybody may write the file, the directory of its name, or that of the file itself.

    The sticky bit (/tmp) is no excuse: it keeps people from taking files away, not from planting them.
    """
    if opened.st_mode & stat.S_IWOTH:
        message = "is writable by everybody; run chmod o-w"
        raise DocumentError("insecure-permissions", path, message, severity)
    for directory in {os.path.dirname(path), os.path.dirname(_find_opened_path(path, descriptor))}:
        if os.stat(directory).st_mode & stat.S_IWOTH and not _is_read_only(directory):
            message = f"its directory {directory} is writable by everybody; move the file to a private one"
            raise DocumentError("insecure-permissions", path, message, severity)


def _is_read_only(directory: str) -> bool:
    """Return whether it is mounted read-only, as Kubernetes mounts a ConfigMap (0777): nobody can plant files there."""
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)


def _find_opened_path(path: str, descriptor: int) -> str:
    """Return where the opened file really is, with symbolic links followed."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return os.path.realpath(path)


def _name_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


# ---- decoding and parsing


def _decode(path: str, raw: bytes) -> str:
    if len(raw) > LARGEST:
        raise DocumentError("too-large", path, f"is larger than {LARGEST // 1024} KiB, the most that is read")
    if (other := _guess_encoding(raw)) is not None:
        raise DocumentError("not-utf8", path, f"is {other}; save it as UTF-8", line=1, column=1)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _find_line_and_column(error.object[: error.start].decode("utf-8"), error.start)
        message = f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise DocumentError("not-utf8", path, message, line=line, column=column) from None
    if (nul := text.find("\0")) >= 0:
        line, column = _find_line_and_column(text, nul)
        raise DocumentError("syntax", path, "contains a NUL character; remove it", line=line, column=column)
    return text


def _guess_encoding(raw: bytes) -> str | None:
    """Return another encoding in which an editor saved the file. None if its first bytes give none away."""
    if raw.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "UTF-32"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    # Without a byte order mark: every other byte of ASCII text is zero.
    start = raw[:64]
    if len(start) > 1 and max(start[0::2].count(0), start[1::2].count(0)) == len(start) // 2:
        return "UTF-16"
    return None


def _find_line_and_column(text: str, index: int) -> tuple[int, int]:
    before = text[:index]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _parse(path: str, text: str) -> dict[str, object]:
    tomli = import_dependency("tomli")

    try:
        parsed: dict[str, object] = tomli.loads(text)
    except RecursionError:
        raise _make_depth_error(path) from None
    except tomli.TOMLDecodeError as error:
        raise _make_syntax_error(path, text, error) from None
    except ValueError:
        # Python refuses to convert integers of thousands of digits, and tomli lets that through.
        raise DocumentError(
            "syntax", path, "an integer does not fit into TOML's 64 bits; write a smaller one"
        ) from None
    return parsed


def _make_depth_error(path: str) -> DocumentError:
    return DocumentError(
        "too-deep", path, "its tables or arrays are nested too deeply; a policy needs only a few levels"
    )


#: What people mean when tomli says so.
_HINTS = {
    "Invalid value": 'put text in quotes ("8GiB"), and write true and false in lower case',
    "Expected newline": "write one key = value on each line, with text in quotes and a list in [ ]",
    "Cannot overwrite": "set each key only once",
    "twice": "put all keys of a table under one header",
    "Unterminated string": "end each string on its own line, with the same quote it begins with",
    "Illegal character": "end each string on its own line, with the same quote it begins with",
    "Expected '='": "write a [table] or key = value on each line",
    "Invalid statement": "write a [table] or key = value on each line",
    "Expected ']'": "close the table's name with ]",
    "Unclosed array": "close the list with ]",
    "Invalid initial character": "write a [table] or key = value on each line",
}


def _find_odd_character(text: str, line: object, column: object) -> str | None:
    """Return what is said of the character at a place. None: it is what it looks like."""
    # Late: only a message about a mistake needs it.
    from tfenv.config.odd_characters import describe_odd_character

    if not isinstance(line, int) or not isinstance(column, int):
        return None
    lines = text.split("\n")
    return describe_odd_character(lines[line - 1][column - 1 : column]) if line <= len(lines) else None


def _find_bare_value(text: str, line: object) -> str | None:
    """Return what to write where a line gives text without quotes. None: it does not."""
    # Late: only a message about a mistake needs it.
    import re

    lines = text.split("\n")
    if not isinstance(line, int) or line > len(lines):
        return None
    pair = re.match(r"""\s*([\w.-]+)\s*=\s*([^\s"'\[{#,=][^"'\[{#,=]*?)\s*(?:#.*)?$""", lines[line - 1])
    # A unit alone, GiB, would be no better in quotes.
    if pair is None or re.fullmatch("[KMGT]i?B", pair[2]):
        return None
    key, value = pair[1], pair[2]
    boolean = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
    if value.lower() in boolean:
        return f"write {key} = {boolean[value.lower()]}"
    is_list = key in {"visible_devices", "allowed_devices", "logical_devices"} and value not in {"all", "none"}
    right = f'["{value}"]' if is_list else f'"{value}"'
    return f"text needs quotes, write {key} = {right}"


def _move_into_text(text: str, line: object, column: object) -> tuple[int | None, int | None]:
    """Return a place inside the text: its last visible character if the parser only noticed at the end."""
    if not isinstance(line, int) or not isinstance(column, int):
        return None, None
    last = _find_line_and_column(text, max(0, len(text.rstrip(" \t\r\n")) - 1))
    return min((line, column), last)


def _make_syntax_error(path: str, text: str, error: ValueError) -> DocumentError:
    # tomli before 2.3 has these only inside its text.
    what = str(getattr(error, "msg", error))
    line, column = getattr(error, "lineno", None), getattr(error, "colno", None)
    hint = _find_odd_character(text, line, column)
    if what.startswith(("Invalid value", "Expected newline")):
        hint = hint or _find_bare_value(text, line)
    hint = hint or next((hint for words, hint in _HINTS.items() if words in what), "see https://toml.io")
    what = what.removesuffix(" (at end of document)")
    line, column = _move_into_text(text, line, column)
    return DocumentError("syntax", path, f"this file is not valid TOML: {what}; {hint}", line=line, column=column)


def _select_policy_table(source: Source, data: dict[str, object]) -> dict[str, object]:
    for depth, name in enumerate(source.table, start=1):
        if name not in data and source.required:
            message = f"has no [{'.'.join(source.table)}] table; add it, or name a tfgpu.toml"
            raise DocumentError("not-found", source.path, message)
        inner = data.get(name, {})
        if not isinstance(inner, dict):
            table = ".".join(source.table[:depth])
            raise DocumentError("wrong-type", source.path, f"{table} is not a table; write [{table}]")
        data = inner
    return data


def _require_shallow(path: str, data: dict[str, object]) -> None:
    """Refuse deep nesting, so that whoever walks through `data` later may do so by recursion."""
    level: list[object] = [data]
    for _ in range(DEEPEST):
        level = [child for node in level for child in _list_children(node)]
        if not level:
            return
    raise _make_depth_error(path)


def _list_children(node: object) -> list[object]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [child for child in children if isinstance(child, (dict, list))]
