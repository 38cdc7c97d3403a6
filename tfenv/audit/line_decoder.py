"""Reads single fields of a line of the log, and makes no values of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NoReturn

from tfenv.audit.query import decode_json
from tfenv.audit.record import MAX_RECORD_BYTES
from tfenv.dependencies import import_dependency

_LONGEST_PID = 18


def choose_decoder(fields: Sequence[str]) -> Callable[[bytes], tuple[str, str | bytes, tuple[bytes, ...]]]:
    """Return what reads of a line its time, its process and the JSON of these fields, and raises where it is in doubt.

    msgspec makes no values of what is not asked for: ten times as fast as `parse_line`. It takes nothing that is not
    JSON, but for bytes that are no text, and numbers that are not finite.
    """
    try:
        msgspec = import_dependency("msgspec")
    except ImportError:  # an optional library: tfenv[audit]
        return _refuse_line
    shape = [("timestamp", str), *((name, msgspec.Raw, msgspec.Raw()) for name in dict.fromkeys(("pid", *fields)))]
    load = msgspec.json.Decoder(msgspec.defstruct("Line", shape, gc=False)).decode
    get_fields = attrgetter(*fields)

    def decode(line: bytes) -> tuple[str, str | bytes, tuple[bytes, ...]]:
        if len(line) > MAX_RECORD_BYTES:
            raise ValueError("it is longer than a record")
        found = load(line)
        if not line.isascii():
            line.decode()
        return found.timestamp, _check_pid(bytes(found.pid)), tuple(map(bytes, get_fields(found)))

    return decode


def _refuse_line(_: bytes) -> NoReturn:
    raise ValueError("msgspec is not installed")


def _check_pid(text: bytes) -> str | bytes:
    """Return the text of a process's number. As it is, in bytes, where it is plainly one."""
    return text if text.isdigit() and len(text) <= _LONGEST_PID else str(decode_json(text or b"null"))
