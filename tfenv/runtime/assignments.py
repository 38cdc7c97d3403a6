"""Watches what a launcher assigns to a process that runs. Ray gives a worker the GPUs of one task after another."""

from __future__ import annotations

import os
import sys

from tfenv.errors import escape_for_terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_EVENT, _VARIABLE = "os.putenv", b"CUDA_VISIBLE_DEVICES"

_notice: Callable[[str], object] | None = None


def watch_assignments(notice: Callable[[str], object]) -> None:
    """Have a function see each value that CUDA_VISIBLE_DEVICES gets. A second call only changes the function.

    An audit hook is the one way in Python to learn of it. It costs a call for every audited event and cannot be
    removed, so only processes to which GPUs are assigned late have one.

    Args:
        notice: It is given the value just before the environment is.
    """
    global _notice  # noqa: PLW0603 - audit hooks are global, too
    if _notice is None:
        sys.addaudithook(_see_event)
    _notice = notice


def _see_event(event: str, arguments: tuple[object, ...]) -> None:
    if event != _EVENT or _notice is None or arguments[0] != _VARIABLE:
        return
    try:
        _notice(os.fsdecode(arguments[1]))  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - raised from here, it would end Ray's worker
        from tfenv.audit.stderr_line import print_to_stderr

        text = f"tfgpu: tfenv failed to notice an assignment: {type(error).__name__}: {error} [internal-error]"
        print_to_stderr(escape_for_terminal(text))
