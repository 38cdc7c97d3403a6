"""TOML values of tfgpu.toml -> the typed values of the policy.

Each `read_…` takes one value of any type. It raises ValueError, as `policy.units` does, whose text is one sentence for
people: what is wrong and what would be right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, cast

from tfenv.policy.model import AutoChoice, KeyPath, MemoryLimit, RankChoice, Selector, VisibleDevices
from tfenv.policy.units import format_limit, parse_duration, parse_limit
from tfenv.values import frozen

_POSITION = re.compile(r"[0-9]{1,4}")
_UUID = re.compile(r"GPU-[0-9A-F][0-9A-F-]*|MIG-(?:GPU-)?[0-9A-F][0-9A-F-]*(?:/[0-9]{1,3}/[0-9]{1,3})?", re.IGNORECASE)
_A_DEVICE = 'a position (0), a UUID ("GPU-8932f937", "MIG-…") or a name ("name:*A100*")'
_SHOWN_CHARACTERS = 60
_SHOWN_ITEMS = 4
#: Bits of the largest integer that is written in decimals; Python refuses to write thousands of digits so.
_SHOWN_BITS = 64
_LARGEST_POSITION = 9999
#: No machine has more GPUs, and no job more processes on one.
_MOST_DEVICES = 1024
_GRANTED = "granted"
#: Percentages are sums of binary fractions: 10% three times is a little more than 30%.
_ROUNDING = 1e-9


@frozen
class DocumentFault:
    """One thing that is wrong in a document, as it was found.

    Attributes:
        path: Where it stands, inside the policy table.
        value: What stands there. Of an unknown key the table around it.
        kind: The code of the finding it becomes.
        message: What the reader of the value says of it. None: the schema is to explain it.
    """

    path: KeyPath
    value: object
    kind: str = "invalid-value"
    message: str | None = None

    @property
    def pruned(self) -> bool:
        """Whether it was left out before its value was looked at."""
        return self.kind in ("unknown-key", "too-many")


class WrongValueError(ValueError):
    """A value that is not understood, or not allowed where it stands.

    Attributes:
        code: Of the finding it becomes.
    """

    def __init__(self, message: str, code: str = "invalid-value") -> None:
        self.code = code
        super().__init__(message)


def quote_value(value: object) -> str:
    """Return a value as its writer sees it, on one line and not longer than a line."""
    # Late: only a message about a mistake needs it.
    import json

    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=not value.isprintable())
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key} = …" for key in value if str(key).isprintable()) + "}"
    elif isinstance(value, list):
        text = "[…]" if len(value) > _SHOWN_ITEMS else "[" + ", ".join(quote_value(item) for item in value) + "]"
    elif isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        text = hex(value)
    else:
        text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


# ---- memory


def read_limit(value: object) -> MemoryLimit:
    """Read a memory limit: "8GiB", "40%", "none"."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise WrongValueError(f'{quote_value(value)} is not a limit; write "8GiB", "40%" or "none"')
    if not isinstance(value, str):
        raise WrongValueError(f'{quote_value(value)} has no unit; write "8GiB", "512MiB" or "40%", with the quotes')
    if len(value) > _SHOWN_CHARACTERS:
        raise WrongValueError(f'{quote_value(value)} is not a size; write "8GiB", "512MiB", "8GB", "40%" or "none"')
    return parse_limit(value)


def read_process_limit(value: object) -> MemoryLimit:
    """Read the limit of one process: "8GiB", "40%", "none", or "granted" for the share that the launcher gave."""
    if value == _GRANTED:
        return MemoryLimit(granted=True)
    if _means_granted(value):
        raise WrongValueError(f'{quote_value(value)} is not understood; write "granted"')
    return read_limit(value)


def read_total(value: object) -> MemoryLimit:
    """Read the limit of all processes of a user together: "16GiB", "50%", "none"."""
    if _means_granted(value):
        raise WrongValueError(
            f"{quote_value(value)} is the share of one process, and this is for all processes of a user; "
            'write "16GiB" or "50%", or memory_limit = "granted"'
        )
    return read_limit(value)


def _means_granted(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() in (_GRANTED, "grant", "share")


def read_size(value: object) -> MemoryLimit:
    """Read an amount of memory: a limit that is not "none"."""
    size = read_limit(value)
    if size.unlimited:
        raise WrongValueError('"none" is not a size; write "8GiB", "512MiB" or "40%"')
    return size


def read_overhead(value: object) -> int:
    """Read what a process takes beside its limit, in bytes: "600MiB", and "none" for nothing."""
    size = read_limit(value)
    if size.fraction is not None:
        raise WrongValueError(f'{quote_value(value)} is a percentage; write a size such as "600MiB", or "none"')
    return size.bytes or 0


def read_sizes(value: object) -> tuple[MemoryLimit, ...]:
    """Read the sizes of logical GPUs: ["30GiB", "30GiB"]."""
    if not isinstance(value, list):
        raise WrongValueError(f'{quote_value(value)} is not a list of sizes; write ["4GiB", "4GiB"]')
    return tuple(read_size(item) for item in value)


def check_split(sizes: tuple[MemoryLimit, ...], limit: MemoryLimit | None) -> None:
    """Check that logical GPUs fit into the limit of their entry, and into the card.

    Bytes and percentages cannot be compared before the card is known. That is left to the plan.

    Args:
        sizes: Of the logical GPUs.
        limit: The entry's own limit. None: it has none.

    Raises:
        WrongValueError: They do not fit.
    """
    fractions = [size.fraction for size in sizes if size.fraction is not None]
    amounts = [size.bytes for size in sizes if size.bytes is not None]
    if sum(fractions) > 1 + _ROUNDING:
        raise WrongValueError(
            f"the logical devices take {sum(fractions):.0%} of the card together; keep them within 100%"
        )
    if limit is None:
        return
    if limit.bytes is not None and sum(amounts) > limit.bytes:
        total = format_limit(MemoryLimit(bytes=sum(amounts)))
    elif limit.fraction is not None and sum(fractions) > limit.fraction + _ROUNDING:
        total = format_limit(MemoryLimit(fraction=sum(fractions)))
    else:
        return
    raise WrongValueError(
        f"the logical devices take {total} together, more than this entry's memory_limit of {format_limit(limit)}; "
        "make them smaller or raise the limit"
    )


# ---- devices


def read_selector(value: object) -> Selector:
    """Read one device: a position, a UUID or the beginning of one, a MIG device, or "name:" and a glob."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise WrongValueError(f"{quote_value(value)} is not a GPU; write {_A_DEVICE}")
    if isinstance(value, int) and not 0 <= value <= _LARGEST_POSITION:
        raise WrongValueError(_explain_selector(value, quote_value(value)))
    text = str(value)
    if _POSITION.fullmatch(text):
        return Selector("position", str(int(text)))
    if text.startswith("name:") and len(text) > len("name:"):
        return Selector("name", text[len("name:") :])
    if _UUID.fullmatch(text) and text.startswith(("GPU-", "MIG-")):
        return Selector("uuid", text)
    raise WrongValueError(_explain_selector(value, text))


def _explain_selector(value: object, text: str) -> str:
    if text.lstrip().startswith("-"):
        return f'{quote_value(value)} is not a GPU; positions start at 0, and visible_devices = "none" hides all GPUs'
    if _UUID.fullmatch(text):
        return f'{quote_value(value)} is not a GPU; the prefix is in capitals, write "{text[:4].upper()}{text[4:]}"'
    if "," in text:
        return f"{quote_value(value)} is not a GPU; write a list, as in [0, 1]"
    if text == "name:":
        return '"name:" needs a pattern for the product name, as in "name:*A100*"'
    return f"{quote_value(value)} is not a GPU; write {_A_DEVICE}"


def read_date(value: object) -> str:
    """Read a day, as "2027-01-31"."""
    # Late: few tables have one.
    from datetime import date

    try:
        return date.fromisoformat(value if isinstance(value, str) else "").isoformat()
    except ValueError:
        text = str(value) if hasattr(value, "isoformat") else quote_value(value)
        raise WrongValueError(f"{text} is not a day; write a date without a time, as in 2027-01-31") from None


def read_selectors(value: object) -> tuple[Selector, ...]:
    """Read a list of devices, or "none". A device that is named twice counts once."""
    if value == "none":
        return ()
    if not isinstance(value, list):
        raise WrongValueError(_explain_list(value))
    return tuple(dict.fromkeys(read_selector(item) for item in value))


def _explain_list(value: object) -> str:
    try:
        single = read_selector(value)
    except ValueError:
        return f'{quote_value(value)} is not a list of GPUs; write [0], ["GPU-8932f937"] or "none"'
    written = str(single) if single.kind == "position" else quote_value(str(single))
    return f"{quote_value(value)} is one GPU, not a list of them; write [{written}]"


def read_visible_devices(value: object) -> VisibleDevices:
    """Read `visible_devices` in all its forms."""
    if value == "all":
        return "all"
    if isinstance(value, Mapping):
        return _read_choice(cast("Mapping[str, object]", value))
    if isinstance(value, str) and value != "none":
        raise WrongValueError(_explain_word(value))
    return read_selectors(value)


def _explain_word(value: str) -> str:
    if len(value) <= _SHOWN_CHARACTERS and re.fullmatch(r"[0-9]+(?: *, *[0-9]+)+", value):
        return f"{quote_value(value)} is a string; write a list, [{', '.join(re.findall('[0-9]+', value))}]"
    if value.strip().lower() in ("", "-1"):
        return f'{quote_value(value)} is not understood; for no GPU at all write "none"'
    if value.lower() in ("all", "none", "auto"):
        right = {"auto": "{count = 1} for one that is free"}.get(value.lower(), f'"{value.lower()}"')
        return f"{quote_value(value)} is not understood; write {right}"
    try:
        read_selector(value)
    except ValueError:
        return f'{quote_value(value)} is not understood; write "all", "none", a list such as [0], or {{count = 1}}'
    return _explain_list(value)


def _read_choice(table: Mapping[str, object]) -> AutoChoice | RankChoice:
    if "count" in table and "rank" in table:
        raise WrongValueError("{count = …} lets tfenv choose and {rank = …} does not; write one of them")
    if "rank" in table:
        return RankChoice(_read_rank(table["rank"]))
    if "count" not in table:
        raise WrongValueError('a table here needs a count or a rank; write {count = 1} or {rank = "auto"}')
    min_free, timeout = table.get("min_free"), table.get("timeout")
    return AutoChoice(
        count=_read_whole_number(table["count"], at_least=1, name="count"),
        prefer=_read_word(table.get("prefer", AutoChoice.prefer), ("most_free",), name="prefer"),
        min_free=None if min_free is None else read_size(min_free),
        when_busy=_read_word(
            table.get("when_busy", AutoChoice.when_busy), ("wait", "cpu", "fail", "share"), name="when_busy"
        ),
        timeout_s=None if timeout is None else _read_duration(timeout),
    )


def _read_rank(value: object) -> Literal["auto"] | int:
    if value == "auto":
        return "auto"
    if isinstance(value, str):
        raise WrongValueError(f'rank = {quote_value(value)} is not understood; write "auto" or a number from 0')
    return _read_whole_number(value, at_least=0, name="rank")


def _read_whole_number(value: object, *, at_least: int, name: str) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or cast("float", value) < at_least:
        raise WrongValueError(
            f"{name} = {quote_value(value)} is not a whole number from {at_least}; write {name} = {at_least}"
        )
    if cast("float", value) > _MOST_DEVICES:
        raise WrongValueError(f"{name} = {quote_value(value)} is too large; the largest is {_MOST_DEVICES}")
    return int(cast("float", value))


def _read_word(value: object, words: tuple[str, ...], *, name: str) -> str:
    if not isinstance(value, str) or value not in words:
        choices = " or ".join(f'"{word}"' for word in words)
        raise WrongValueError(f"{name} = {quote_value(value)} is not understood; write {choices}")
    return value


def _read_duration(value: object) -> float:
    if not isinstance(value, str):
        raise WrongValueError(
            f'timeout = {quote_value(value)} has no unit; write "30s", "10min", "2h" or "1d", with the quotes'
        )
    if len(value) > _SHOWN_CHARACTERS:
        raise WrongValueError(f'{quote_value(value)} is not a duration; write "30s", "10min", "2h" or "1d"')
    return parse_duration(value)
