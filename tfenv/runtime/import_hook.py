"""Wraps the loader of a watched package, so that `enforce` is called before and after the package's own code runs.

The finder loads it by its file when a watched name is searched for the first time. Searching has no effect of its own.
Files are looked for when the package is executed, and `enforce` is imported only if there may be one. Until then
nothing is imported that is a file: the program may have rewritten sys.path, or have a file of that name.
"""

import _thread  # built in; gevent wants to be the first to import threading
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


# Watched names that are being searched now, each with its thread: one thread's search must not blind another's.
_searching: "set[tuple[str, int]]" = set()
# The module that was executed last, by name.
_executed: "dict[str, ModuleType]" = {}


def find(
    name: str, path: "Sequence[str] | None", target: "ModuleType | None", ours: "Any", start: "Mapping[str, str | None]"
) -> "ModuleSpec | None":
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
                _wrap_loader(name, spec, ours, start)
                return spec
        return None
    finally:
        _searching.discard(search)


def report_late(name: str, ours: "Any", start: "Mapping[str, str | None]") -> None:
    """Report that the package was there before the hook was, as in a notebook that installs tfenv from a cell.

    Mocks and stubs that tests put into sys.modules have no spec and are left alone.
    """
    if isinstance(getattr(sys.modules.get(name), "__spec__", None), sys.modules["_frozen_importlib"].ModuleSpec):
        enforcer = Enforcer(name, ours, start)
        if enforcer.load():
            enforcer.call("too_late", start)


def _list_finders_after(ours: "Any") -> "list[Any]":
    # Those before ours were asked already; those without find_spec Python 3.11 asks itself when we find nothing.
    finders: list[Any] = list(sys.meta_path)
    if ours in finders:
        finders = finders[finders.index(ours) + 1 :]
    return [finder for finder in finders if hasattr(finder, "find_spec")]


def _wrap_loader(name: str, spec: "ModuleSpec", ours: "Any", start: "Mapping[str, str | None]") -> None:
    loader: Any = spec.loader
    run = getattr(loader, "exec_module", None)
    if run is None or isinstance(run, ExecModuleWrapper):  # a namespace left behind by an uninstall; a shared loader
        return
    wrapper = ExecModuleWrapper(name, loader, Enforcer(name, ours, start))
    # On the instance, so that inspect, pkgutil and runpy see the loader they know. A class is shared by all modules.
    if isinstance(loader, type) or not hasattr(loader, "__dict__"):
        spec.loader = LoaderProxy(loader, wrapper)  # type: ignore[assignment]
    else:
        loader.exec_module = wrapper


class ExecModuleWrapper:
    """Takes the place of `exec_module` on one loader until that has succeeded."""

    def __init__(self, name: str, loader: "Any", enforcer: "Enforcer") -> None:
        self.name = name
        self.loader = loader
        self.enforcer = enforcer
        self.run: Callable[[ModuleType], None] = loader.exec_module

    def __call__(self, module: "ModuleType") -> None:
        # zipimport has one loader for all modules of an archive; reload() comes with a module that is governed.
        if module.__name__ != self.name or _executed.get(self.name) is module:
            self.run(module)
            return
        is_governed = self.enforcer.load()
        if is_governed:
            self.enforcer.call("before_import", self.enforcer.start)
        self.run(module)  # an error of the framework's own goes out unchanged; the next try is governed like this one
        if is_governed:
            # The importer gets what stands in sys.modules: a package may have replaced itself there.
            self.enforcer.call("after_import", sys.modules.get(self.name, module))
        _executed[self.name] = module
        self._restore_loader()

    def _restore_loader(self) -> None:
        # Unless somebody wrapped the loader after us, it is itself again.
        if getattr(self.loader, "__dict__", {}).get("exec_module") is self:
            del self.loader.exec_module


class LoaderProxy:
    """Takes the place of a loader that cannot be wrapped, until it is used, as importlib.util.LazyLoader does."""

    def __init__(self, loader: "Any", wrapper: "ExecModuleWrapper") -> None:
        self.loader = loader
        self.wrapper = wrapper

    def __getattr__(self, name: str) -> "Any":
        return getattr(self.loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        """Give the module its own loader back, and run it between the two calls of `enforce`."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.wrapper(module)


class Enforcer:
    """Calls `tfenv.runtime.enforce` for one framework. Whatever fails is said, recorded, and `on_error`'s to decide.

    Attributes:
        name: The framework's top-level package.
        ours: The finder. It loads modules of tfenv by their files.
        start: `finder.START`.
    """

    def __init__(self, name: str, ours: "Any", start: "Mapping[str, str | None]") -> None:
        self.name = name
        self.ours = ours
        self.start = start
        self._enforce: Any = None

    def load(self) -> bool:
        """Import enforce, if there may be a policy file.

        Returns:
            Whether there may be one, and enforce could be imported.

        Raises:
            RuntimeError: It cannot be imported, and the machine's `on_error` is "fail".
        """
        try:
            if not self._may_find_policy():
                return False
            self._enforce = self.import_enforce()
        except Exception as first:
            return self._load_again(first)
        return True

    def _may_find_policy(self) -> bool:
        if "tfenv.runtime.enforce" in sys.modules:
            return True
        return bool(self.ours.load_alone("config.presence").may_find_policy(self.start))

    def _load_again(self, first: Exception) -> bool:
        """Import enforce once more: a fault may have passed, as while an installer replaces files."""
        try:
            if not self.ours.load_alone("runtime.emergency").wait_for_package(self.ours.find_folder()):
                return False
            self.ours.load_alone("runtime.own_imports").forget_package()
            if not self._may_find_policy():
                return False
            self._enforce = self.import_enforce()
        except Exception as second:
            second.__context__ = first
            self._handle(second)
            return False
        return True

    def import_enforce(self) -> "Any":
        """Import enforce, and all it needs, from tfenv's own folders. `tfenv` means this package from now on."""
        own_imports = self.ours.load_alone("runtime.own_imports")
        own_imports.set_folders(self.ours.find_folder(), [] if self.start.get("interpreter") else self.ours.path)
        self.ours.find_own = own_imports.find
        own_imports.take_name(self.ours.find_folder())
        with own_imports.Inside():
            from tfenv.runtime import enforce
        return enforce

    def call(self, function: str, argument: object) -> None:
        """Call a function of enforce.

        Raises:
            RuntimeError: The policy cannot be applied and `on_error = "fail"`. Ctrl-C and sys.exit pass, too.
        """
        from tfenv.errors import PolicyError

        try:
            with self.ours.load_alone("runtime.own_imports").Inside():
                getattr(self._enforce, function)(self.name, argument)
        except PolicyError:
            raise
        except Exception as error:
            current = getattr(self._enforce, "get_current", lambda: None)()
            self._handle(error, None if current is None else current.loaded.policy.on_error)

    def _handle(self, error: Exception, on_error: str | None = None) -> None:
        try:
            emergency = self.ours.load_alone("runtime.emergency")
        except Exception:
            sys.stderr.write(f"tfgpu: tfenv failed, no policy is applied: {error!a} [internal-error]\n")
            return
        emergency.handle(error, self.name, on_error)
