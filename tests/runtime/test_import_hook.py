"""What happens between the search for TensorFlow and the moment the program gets it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from tests.environments import STAND_IN_TENSORFLOW, Environment

TELL = "import json, sys; print(json.dumps(sys.story))"
GOVERNED = ["before", "code", "after"]


def test_second_import_does_nothing(armed: Environment) -> None:
    """Importing again finds the module in sys.modules: nothing is done twice."""
    assert armed.story(f"import tensorflow; import tensorflow; {TELL}") == GOVERNED


def test_submodule_first(own: Environment) -> None:
    """Whatever submodule is imported first, the package's own code is governed once."""
    (own.site_packages / "tensorflow" / "python.py").write_text("")
    assert own.story(f"import tensorflow.python; from tensorflow import python; {TELL}") == GOVERNED


def test_threads_importing_at_once(armed: Environment) -> None:
    """Many threads that import at the same moment are governed once, and all get the same module."""
    program = f"""
import threading
barrier, found = threading.Barrier(16), []
def work():
    barrier.wait()
    import tensorflow
    found.append(tensorflow)
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 16 and len(set(map(id, found))) == 1
{TELL}
"""
    for _ in range(3):
        assert armed.story(program) == GOVERNED


def test_threads_probing_while_importing(armed: Environment) -> None:
    """A thread that probes at the same moment does not blind the one that imports."""
    program = f"""
import importlib.machinery, importlib.util, threading
barrier = threading.Barrier(8)
def probe():
    barrier.wait()
    for _ in range(50): importlib.machinery.PathFinder.find_spec("tensorflow"); importlib.util.find_spec("tensorflow")
threads = [threading.Thread(target=probe) for _ in range(7)]
for thread in threads: thread.start()
barrier.wait()
import tensorflow
for thread in threads: thread.join()
{TELL}
"""
    assert armed.story(program) == GOVERNED


def test_reload(armed: Environment) -> None:
    """importlib.reload runs TensorFlow's code again, but the policy's not."""
    program = f"import importlib, tensorflow; importlib.reload(tensorflow); {TELL}"
    assert armed.story(program) == [*GOVERNED, "code"]


def test_import_after_removal_is_governed_again(armed: Environment) -> None:
    """A module that is taken out of sys.modules and imported anew is a new one, and governed."""
    program = f"import sys, tensorflow; del sys.modules['tensorflow']; import tensorflow; {TELL}"
    assert armed.story(program) == [*GOVERNED, *GOVERNED]


def test_lazy_loader(armed: Environment) -> None:
    """With importlib's LazyLoader the policy waits, as the package does, for the first access."""
    program = f"""
import importlib.util, sys
spec = importlib.util.find_spec("tensorflow")
spec.loader = importlib.util.LazyLoader(spec.loader)
tensorflow = importlib.util.module_from_spec(spec)
sys.modules["tensorflow"] = tensorflow
spec.loader.exec_module(tensorflow)
assert not hasattr(sys, "story")
tensorflow.__name__, tensorflow.sys
{TELL}
"""
    assert armed.story(program) == GOVERNED


def test_spec_that_was_kept(armed: Environment) -> None:
    """A spec that was found by probing and is executed later is governed, also on a second try after a failure."""
    program = f"""
import importlib.util, sys
spec = importlib.util.find_spec("tensorflow")
sys.break_tensorflow = True
for _ in range(2):
    sys.modules["tensorflow"] = module = importlib.util.module_from_spec(spec)
    try: spec.loader.exec_module(module)
    except ImportError: sys.break_tensorflow = False
{TELL}
"""
    assert armed.story(program) == ["before", "code", *GOVERNED]


def test_loader_is_itself_again(armed: Environment) -> None:
    """After the import the loader has no trace of us, and the module's metadata is Python's own."""
    program = """
import json, sys, tensorflow
loader = tensorflow.__loader__
print(json.dumps([sorted(vars(loader)), type(loader).__name__, tensorflow.__spec__.loader is loader]))
"""
    assert armed.story(program) == [["name", "path"], "SourceFileLoader", True]


def test_failing_import_is_governed_again(armed: Environment) -> None:
    """TensorFlow's own ImportError passes unchanged, and the retry is governed like the first."""
    program = f"""
import sys
sys.break_tensorflow = True
try: import tensorflow
except ImportError as error: assert str(error) == "libfoo.so: cannot open shared object file", error
assert "tensorflow" not in sys.modules
sys.break_tensorflow = False
import tensorflow
{TELL}
"""
    assert armed.story(program) == ["before", "code", *GOVERNED]


def test_policy_error_every_time(armed: Environment) -> None:
    """When the policy says fail, every import raises PolicyError, and `except ImportError` does not swallow it."""
    program = f"""
import sys
for _ in range(3):
    try:
        import tensorflow
    except ImportError:
        sys.story.append("swallowed")
    except RuntimeError as error:
        sys.story.append(f"{{type(error).__name__}}: {{error}}")
    assert "tensorflow" not in sys.modules
{TELL}
"""
    said = "PolicyError: the policy says no [test]"
    assert armed.story(program, env={"TFGPU_CONFIG": "fail"}) == ["before", said] * 3


def test_bug_of_ours_costs_the_program_nothing(armed: Environment) -> None:
    """Any other exception of ours is said in one line, and the program goes on."""
    done = armed.run("-c", f"import tensorflow; {TELL}", env={"TFGPU_CONFIG": "bug"})
    assert (done.returncode, json.loads(done.stdout)) == (0, GOVERNED)
    fault = "tfenv failed at import tensorflow: ZeroDivisionError: "
    assert done.stderr == f'tfgpu: {fault}: no policy is applied (on_error = "warn") [internal-error]\n'


@pytest.mark.parametrize("exception", ["KeyboardInterrupt", "SystemExit"])
def test_signals_pass(own: Environment, exception: str) -> None:
    """Ctrl-C, or a signal handler that ends the process, works while the policy is read."""
    enforce = own.site_packages / "tfenv" / "runtime" / "enforce.py"
    enforce.write_text(f"def before_import(name, start): raise {exception}")
    program = f"try:\n    import tensorflow\nexcept {exception}:\n    print('\"passed\"')"
    assert own.story(program) == "passed"


def test_module_that_replaces_itself(own: Environment) -> None:
    """A package that puts another module into sys.modules in its place: the policy gets what the program gets."""
    code = STAND_IN_TENSORFLOW + "import types\nsys.modules[__name__] = types.ModuleType(__name__)\n"
    (own.site_packages / "tensorflow" / "__init__.py").write_text(code)
    assert own.story(f"import tensorflow; {TELL}") == GOVERNED


# ---- other finders and other loaders


def test_zipimport(armed: Environment, tmp_path: Path) -> None:
    """TensorFlow inside an archive is governed; its neighbours, which share the loader, are not."""
    with zipfile.ZipFile(tmp_path / "packages.zip", "w") as archive:
        archive.writestr("tensorflow.py", STAND_IN_TENSORFLOW)
        archive.writestr("neighbour.py", "")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / "packages.zip")!r})
import importlib.util
importlib.util.find_spec("tensorflow"), importlib.util.find_spec("tensorflow")
import neighbour
assert not hasattr(sys, "story")
import tensorflow
assert tensorflow.__file__.startswith({str(tmp_path)!r})
assert "exec_module" not in vars(tensorflow.__loader__)
{TELL}
"""
    assert armed.story(program) == GOVERNED


LOADERS = {
    "slots": "class Loader:\n    __slots__ = ()\n    def create_module(self, spec): return None\n"
    "    def exec_module(self, module): sys.story = getattr(sys, 'story', []) + ['code']\nloader = Loader()",
    "class": "class loader:\n    @staticmethod\n    def create_module(spec): return None\n"
    "    @staticmethod\n    def exec_module(module): sys.story = getattr(sys, 'story', []) + ['code']\n",
}


@pytest.mark.parametrize("kind", LOADERS)
def test_loader_that_cannot_be_wrapped(own: Environment, kind: str) -> None:
    """A loader without a __dict__, or one that is a class, is governed and not changed."""
    enforce = own.site_packages / "tfenv" / "runtime" / "enforce.py"
    enforce.write_text(enforce.read_text().replace("story.append(", "sys.story.append("))
    program = f"""
import importlib.machinery, sys
sys.story = []
{LOADERS[kind]}
before = loader.exec_module
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "tensorflow": return importlib.machinery.ModuleSpec(name, loader)
sys.meta_path.insert(1, Finder)
import tensorflow
assert tensorflow.__loader__ is loader and tensorflow.__spec__.loader is loader and loader.exec_module == before
{TELL}
"""
    assert own.story(program) == GOVERNED


WRAPPING_FINDER = """
import importlib.util, sys
class Wrapper:  # as wrapt and ddtrace do it: search anew, guarded against itself, and wrap what comes
    busy = False
    def find_spec(self, name, path=None, target=None):
        if name != "tensorflow" or self.busy: return None
        self.busy = True
        try: spec = importlib.util.find_spec(name)
        finally: self.busy = False
        run = spec.loader.exec_module
        def exec_module(module):
            sys.__dict__.setdefault("story", []).append("theirs")
            run(module)
        spec.loader.exec_module = exec_module
        return spec
"""


@pytest.mark.parametrize("place", [0, 1])
def test_finder_that_wraps_too(armed: Environment, place: int) -> None:
    """Another tool's wrapping finder, before ours or after it, has its effect and leaves us ours."""
    program = f"{WRAPPING_FINDER}\nsys.meta_path.insert({place}, Wrapper())\nimport tensorflow\n{TELL}"
    story = armed.story(program)
    assert isinstance(story, list)
    assert sorted(story) == sorted(["theirs", *GOVERNED])
    assert [event for event in story if event != "theirs"] == GOVERNED


def test_finder_that_fails(armed: Environment) -> None:
    """What another finder raises goes to the program, as without us."""
    program = """
import sys
class Failing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "tensorflow": raise LookupError("theirs")
sys.meta_path.insert(1, Failing)
try: import tensorflow
except LookupError: sys.meta_path.remove(Failing)
import tensorflow, json
print(json.dumps(sys.story))
"""
    assert armed.story(program) == GOVERNED
