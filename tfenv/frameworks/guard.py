"""What all entry points do: settle visibility once per process, and keep the faults of tfenv to itself."""

from __future__ import annotations

import os
import sys
from functools import wraps

from tfenv.errors import PolicyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tfenv.frameworks.base import PolicyCallbacks

#: Where a fault is tfenv's own. An exception raised elsewhere is the program's: the handler of a signal raised it.
_OURS = {"tfenv", "google", "jax", "jaxlib", "pynvml", "structlog", "tensorflow", "tomli", "torch", "jsonschema"}
#: Marks a function that asks the policy.
_CHECKS_USE = "checks_use"


class EntryPointGuard:
    """The lock of a framework's entry points, and what was settled under it.

    Attributes:
        policy: The policy of this process.
        lock: Held inside of an entry point, but not while the process waits for a GPU. A fork waits for it.
        listed_by: The pid that settled which GPUs are visible. A forked child settles anew. 0: none did.
        settling_by: The pid that settles visibility in one of its threads, which may wait for a GPU. 0: none does.
    """

    def __init__(self, policy: PolicyCallbacks, first_listing: str) -> None:
        """
        Args:
            policy: The policy of this process.
            first_listing: The entry point that opens CUDA, as records name it.
        """
        import threading  # not before the program could: gevent wants to be first

        self.policy = policy
        self._first_listing = first_listing
        self._make_lock, self._make_condition = threading.RLock, threading.Condition
        self.listed_by = 0
        self.renew_lock()

    # -- forking

    def follow_forks(self) -> None:
        """Have forks wait until no thread is inside of an entry point. Call it once per process."""
        os.register_at_fork(before=self.acquire_lock, after_in_parent=self.release_lock, after_in_child=self.renew_lock)

    def acquire_lock(self) -> None:
        """Wait until no thread is inside of an entry point: a child would inherit locks of modules imported there."""
        self.lock.acquire()

    def release_lock(self) -> None:
        """Let other threads enter again, in the parent of a fork."""
        self.lock.release()

    def renew_lock(self) -> None:
        """Make a new lock in a forked child, where nobody may be left who could release the parent's."""
        self.lock = self._make_lock()
        self.settled = self._make_condition(self.lock)
        self.settling_by = 0

    # -- calling the policy

    def before_listing(self) -> None:
        """Settle which GPUs are visible, once per process."""
        with self.lock:
            while self.settling_by == os.getpid():
                self.settled.wait()
            if self.listed_by == os.getpid():
                return
            self.settling_by = os.getpid()
            try:
                # A PolicyError leaves it unlisted: the next try meets the policy again.
                self.run_guarded(self._first_listing, lambda: self.policy.before_listing(self.settled.wait))
                self.listed_by = os.getpid()
            finally:
                self.settling_by = 0
                self.settled.notify_all()

    def run_guarded(self, entry_point: str, action: Callable[[], object]) -> None:
        """Run code of tfenv. A fault of its own breaks the program only if the policy asks for that."""
        try:
            action()
        except PolicyError:
            raise
        except Exception as error:
            if _is_from_program(error):
                raise
            self.policy.report_fault(error, entry_point)


def watch_function(holder: object, name: str, policy: PolicyCallbacks) -> None:
    """Have a policy asked whenever the program calls a function. A second call, or one that is not there, does nothing.

    Args:
        holder: The module or class that the function is looked up in.
        name: The function's name there.
        policy: Refuses GPUs that are another task's by now.
    """
    original: Any = getattr(holder, name, None)
    if not callable(original) or hasattr(original, _CHECKS_USE):
        return

    @wraps(original)
    def use_devices(*args: Any, **kwargs: Any) -> Any:
        policy.check_use()
        return original(*args, **kwargs)

    for attribute in ("cache_clear", "cache_info"):  # of a function that keeps its results: its callers clear them
        if hasattr(original, attribute):
            setattr(use_devices, attribute, getattr(original, attribute))
    setattr(use_devices, _CHECKS_USE, True)
    setattr(holder, name, use_devices)


def _is_from_program(error: BaseException) -> bool:
    """Return whether the program itself raised an exception: the handler of a signal that came meanwhile."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = str(traceback.tb_frame.f_globals.get("__name__", "")) if traceback is not None else "tfenv"
    return module.partition(".")[0] not in (_OURS | sys.stdlib_module_names) - {"__main__"}
