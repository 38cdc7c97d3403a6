"""The child process that `tfgpu verify` measures, and how the two speak: a line of JSON each, in turn."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, final

from tfenv.cli.diagnosis.interpreter import NoAnswerError
from tfenv.cli.output import print_error
from tfenv.errors import escape_for_terminal

_CHUNK = 1 << 16
_END_TIMEOUT_S = 20
#: How tfenv begins what it says on stderr, as that the process waits for a GPU.
_OURS = b"tfgpu:"


@final
class ChildProgram:
    """A probe that takes memory step by step. It ends with the `with` block, whatever happened.

    Attributes:
        pid: Of the interpreter. A wrapper that starts it as a child of its own hides its number.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], timeout_s: float) -> None:
        """
        Args:
            command: The interpreter and its arguments.
            variables: What its environment has besides.
            timeout_s: Seconds until it must be done.
        """
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        # In a session of its own Ctrl-C reaches only tfgpu, which ends it with all that it started.
        self._process = subprocess.Popen(
            command, env={**os.environ, **variables}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.pid = self._process.pid
        self._answers, self._complaints = bytearray(), bytearray()
        self._forwarded = 0

    def __enter__(self) -> ChildProgram:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(subprocess.TimeoutExpired):
            if error is None:  # it ends by itself, and writes its last record
                self._process.communicate(timeout=_END_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.communicate()

    def send(self, order: Mapping[str, object]) -> None:
        """Say how to go on.

        Raises:
            NoAnswerError: It has ended.
        """
        stdin = _get_pipe(self._process.stdin)
        try:
            stdin.write(json.dumps(order).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise NoAnswerError(self._describe_end()) from None

    def read(self) -> dict[str, Any]:
        """Wait for the next answer. Print meanwhile what tfenv says in the child.

        Raises:
            NoAnswerError: It ended without one, or took too long. The text says which, in its own last words.
        """
        stdout, stderr = _get_pipe(self._process.stdout), _get_pipe(self._process.stderr)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ, self._answers)
            selector.register(stderr, selectors.EVENT_READ, self._complaints)
            while b"\n" not in self._answers:
                left = self._deadline - time.monotonic()
                ready = selector.select(max(0.0, left)) if selector.get_map() else []
                if not ready:
                    raise NoAnswerError(self._describe_end())
                for key, _ in ready:
                    chunk = os.read(key.fd, _CHUNK)
                    key.data.extend(chunk)
                    if not chunk:
                        selector.unregister(key.fileobj)
                self._forward_messages()
        line, _, rest = bytes(self._answers).partition(b"\n")
        self._answers[:] = rest
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _forward_messages(self) -> None:
        *lines, _ = bytes(self._complaints[self._forwarded :]).split(b"\n")
        for line in lines:
            self._forwarded += len(line) + 1
            if line.startswith(_OURS):
                print_error(escape_for_terminal(line.decode(errors="replace")))

    def _describe_end(self) -> str:
        """Return why there is no answer."""
        if time.monotonic() >= self._deadline:
            return f"no answer within {self._timeout_s:g} s"
        status = self._process.wait()
        if status < 0:
            return f"it was ended by {signal.Signals(-status).name}"
        last_line = bytes(self._complaints).decode(errors="replace").strip().rpartition("\n")[2]
        return last_line or f"it ended with status {status}"


def _get_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
