"""Wraps the loader of a watched package, so that `enforce` is called before and after the package's own code runs.

The finder imports it when a watched name is searched for the first time. Searching has no effect of its own. Files are
looked for when the package is executed, and `enforce` is imported only if there may be one.
"""

from __future__ import annotations

import _thread  # built in; gevent wants to be the first to import threading
import sys
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType
    from typing import Any

    Start = Mapping[str, str | None]

# Watched names that are being searched now, each with its thread: one thread's search must not blind another's.
_searching: set[tuple[str, int]] = set()
# The module that was executed last, by name.
_executed: dict[str, ModuleType] = {}


def find(
    name: str, path: Sequence[str] | None, target: ModuleType | None, ours: Any, start: Start
) -> ModuleSpec | None:
    """Ask the finders after ours for a watched package and wrap the loader of what they find.

    Args:
        name, path, target: As for any finder's `find_spec`.
        ours: The finder that asks.
        start: `finder.START`, handed on to `enforce`.

    Returns:
        What the other finders found. None when they found nothing.
    """
    search = (name, _thread.get_ident())
    if search in _searching:  # a finder we asked begins the search anew: it wants to wrap the loader, too
        return None
    _searching.add(search)
    try:
        for finder in _list_finders_after(ours):
            spec: ModuleSpec | None = finder.find_spec(name, path, target)
            if spec is not None:
                _wrap_loader(name, spec, start)
                return spec
        return None
    finally:
        _searching.discard(search)


def report_late(name: str, start: Start) -> None:
    """Report that the package was there before the hook was, as in a notebook that installs tfenv from a cell.

    Mocks and stubs that tests put into sys.modules have no spec and are left alone.
    """
    if isinstance(getattr(sys.modules.get(name), "__spec__", None), ModuleSpec):
        enforce = _import_enforce(start)
        if enforce is not None:
            _call_guarded(enforce.too_late, name, start)


def _list_finders_after(ours: Any) -> list[Any]:
    # Those before ours were asked already; those without find_spec Python 3.11 asks itself when we find nothing.
    finders: list[Any] = list(sys.meta_path)
    if ours in finders:
        finders = finders[finders.index(ours) + 1 :]
    return [finder for finder in finders if hasattr(finder, "find_spec")]


def _wrap_loader(name: str, spec: ModuleSpec, start: Start) -> None:
    loader: Any = spec.loader
    run = getattr(loader, "exec_module", None)
    if run is None or isinstance(run, ExecModuleWrapper):  # a namespace left behind by an uninstall; a shared loader
        return
    wrapper = ExecModuleWrapper(name, loader, start)
    # On the instance, so that inspect, pkgutil and runpy see the loader they know. A class is shared by all modules.
    if isinstance(loader, type) or not hasattr(loader, "__dict__"):
        spec.loader = LoaderProxy(loader, wrapper)  # type: ignore[assignment]
    else:
        loader.exec_module = wrapper


class ExecModuleWrapper:
    """Takes the place of `exec_module` on one loader until that has succeeded."""

    def __init__(self, name: str, loader: Any, start: Start) -> None:
        self.name = name
        self.loader = loader
        self.start = start
        self.run: Callable[[ModuleType], None] = loader.exec_module

    def __call__(self, module: ModuleType) -> None:
        # zipimport has one loader for all modules of an archive; reload() comes with a module that is governed.
        if module.__name__ != self.name or _executed.get(self.name) is module:
            self.run(module)
            return
        enforce = _import_enforce(self.start)
        if enforce is not None:
            _call_guarded(enforce.before_import, self.name, self.start)
        self.run(module)  # an error of the framework's own goes out unchanged; the next try is governed like this one
        if enforce is not None:
            # The importer gets what stands in sys.modules: a package may have replaced itself there.
            _call_guarded(enforce.after_import, self.name, sys.modules.get(self.name, module))
        _executed[self.name] = module
        self._restore_loader()

    def _restore_loader(self) -> None:
        # Unless somebody wrapped the loader after us, it is itself again.
        if getattr(self.loader, "__dict__", {}).get("exec_module") is self:
            del self.loader.exec_module


class LoaderProxy:
    """Takes the place of a loader that cannot be wrapped, until it is used, as importlib.util.LazyLoader does."""

    def __init__(self, loader: Any, wrapper: ExecModuleWrapper) -> None:
        self.loader = loader
        self.wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own loader back, and run it between the two calls of `enforce`."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.wrapper(module)


def _import_enforce(start: Start) -> Any:
    """Import tfenv.runtime.enforce, if there may be a policy file.

    Returns:
        The module. None if there is no file, or if tfenv is half uninstalled: the program goes on as if it were gone.
    """
    try:
        if "tfenv.runtime.enforce" not in sys.modules:
            from tfenv.config.presence import may_find_policy

            if not may_find_policy(start):
                return None
        from tfenv.runtime import enforce
    except Exception:
        return None
    return enforce


def _call_guarded(call: Callable[[str, Any], None], name: str, argument: object) -> None:
    """Let a PolicyError out and nothing else of ours. What is not an Exception (Ctrl-C, sys.exit) is the program's."""
    try:
        call(name, argument)
    except Exception as error:
        from tfenv.errors import PolicyError

        if isinstance(error, PolicyError):
            raise
