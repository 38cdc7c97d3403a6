"""Arms the hook in the Python processes of `tfgpu run`, through PYTHONPATH. Then runs the sitecustomize it shadows.

The interpreter may belong to an environment that has neither tfenv nor its dependencies. Nothing of ours is put on its
sys.path: the hook finds the package tfenv, and nothing else, in the folder that `tfgpu run` wrote into TFGPU_RESOLVER.
What needs dependencies is done in a child process of the interpreter named there.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType


def _get_folder() -> str:
    return __file__.rpartition("/")[0]


def _arm() -> None:
    try:
        import _tfenv_boot  # noqa: F401 (arms itself: this environment has tfenv)
    except ImportError:
        import os

        finder = _load_finder()
        folder, _, interpreter = os.environ.get("TFGPU_RESOLVER", "").partition(os.pathsep)
        finder.START.update({"folder": folder, "interpreter": interpreter} if interpreter else {})


def _load_finder() -> "ModuleType":
    """Load the finder under the name it has when installed, from the wheel's root or from a checkout."""
    from importlib.machinery import SourceFileLoader  # importlib.util would take half as long as Python's whole start

    root = _get_folder().rpartition("/tfenv/")[0]
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
    raise ImportError("tfenv's finder is missing")


def _chain() -> None:
    """Run the sitecustomize that Python would have found without us. Python reports its errors as always.

    Our folder leaves sys.path, so that the search goes on behind it and the program sees the path it would have.
    It stays in PYTHONPATH for the processes that follow.
    """
    sys.path[:] = [entry for entry in sys.path if entry != _get_folder()]
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
