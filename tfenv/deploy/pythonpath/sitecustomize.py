"""Arms the hook in the Python processes of `tfgpu run`, through PYTHONPATH; then runs the sitecustomize it shadows.

The interpreter may belong to another environment, which has neither tfenv nor its dependencies. Nothing of ours is
put on its sys.path: a finder that is asked after all others lends exactly the packages named below, from the folders
that `tfgpu run` wrote into TFGPU_LIBRARIES, and only from the first search for a watched framework on. A program that
never imports one sees nothing of it; one that does keeps its own structlog, if it has one.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_LENT = (
    "tfenv",
    *("tomli", "structlog", "jsonschema", "watchdog", "pynvml", "rich"),
    # what those need in turn
    *("attr", "attrs", "jsonschema_specifications", "markdown_it", "mdurl", "pygments", "referencing", "rpds"),
    "typing_extensions",
)


class Lender:
    """Finds tfenv and its dependencies in the environment that `tfgpu run` was started from."""

    @staticmethod
    def find_spec(
        name: str,
        path: "Sequence[str] | None" = None,  # noqa: ARG004 (finders are called with three arguments)
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if name not in _LENT:
            return None
        import os
        from importlib.machinery import PathFinder

        folders = os.environ.get("TFGPU_LIBRARIES", "").split(os.pathsep)
        return PathFinder.find_spec(name, [folder for folder in folders if folder], target)


def _folder() -> str:
    return __file__.rpartition("/")[0]


def _arm() -> None:
    try:
        import _tfenv_boot
    except ImportError:
        boot = _load_boot()
    else:
        boot = _tfenv_boot
    boot.lender = Lender  # type: ignore[attr-defined]


def _load_boot() -> "ModuleType":
    """The boot module under the name it has when installed: at the root of the wheel, or in a checkout."""
    from importlib.machinery import SourceFileLoader  # importlib.util would take half as long as Python's whole start

    root = _folder().rpartition("/tfenv/")[0]
    for path in (root + "/_tfenv_boot.py", root + "/tfenv/runtime/finder.py"):
        loader = SourceFileLoader("_tfenv_boot", path)
        module = type(sys)("_tfenv_boot")
        module.__file__ = path
        module.__loader__ = loader
        try:
            loader.exec_module(module)
        except FileNotFoundError:
            continue
        sys.modules["_tfenv_boot"] = module
        return module
    raise ImportError("no boot module")


def _chain() -> None:
    """Run the sitecustomize that Python would have found without us; its errors are reported as Python reports them.

    Our folder leaves sys.path, so that the search goes on behind it and the program sees the path it would have.
    It stays in PYTHONPATH for the processes that follow.
    """
    sys.path[:] = [entry for entry in sys.path if entry != _folder()]
    ourselves = sys.modules.pop(__name__)
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        sys.modules[__name__] = ourselves


try:
    _arm()
except (Exception, SystemExit):  # a SystemExit here ends the interpreter with "Fatal Python error"
    pass
_chain()
