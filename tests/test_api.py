"""The Python API: what holds here, what is wrong, what can still be applied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tfenv
from tfenv.api import Explanation, Status
from tfenv.errors import Finding, PolicyError
from tfenv.policy.model import MemoryLimit, Plan, PlannedDevice

if TYPE_CHECKING:
    from typing_extensions import assert_type

REPOSITORY = Path(__file__).parents[1]
Simulated = Callable[..., dict[str, str]]

needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="no TensorFlow here")
ONE_OF_FOUR = '[gpu]\nvisible_devices = [2]\nmemory_limit = "1000MiB"\n\n[audit]\nfile = "audit.jsonl"\n'


def ask(program: str, folder: Path, env: dict[str, str]) -> Any:
    """What a program in a directory prints last, as JSON; `-S` keeps the hook out that this environment may have."""
    path = os.pathsep.join([env.get("PYTHONPATH", str(REPOSITORY)), sysconfig.get_path("purelib")])
    result = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(program)],
        cwd=folder,
        env=env | {"XDG_CONFIG_HOME": str(folder / "config"), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# ---- check and explain


def test_check_finds_mistakes(tmp_path: Path) -> None:
    """`check` returns findings with file, line, column and key."""
    path = tmp_path / "tfgpu.toml"
    path.write_text("[gpu]\nmemory_growth = 3\n")
    (finding,) = tfenv.check(path)
    assert (finding.path, finding.line, finding.column, finding.key) == (str(path), 2, 1, "gpu.memory_growth")
    path.write_text("[gpu]\nmemory_growth = true\n")
    assert tfenv.check(str(tmp_path)) == ()


def test_check_of_nothing_is_a_finding(tmp_path: Path) -> None:
    """A path that does not exist is a finding, never an exception."""
    (finding,) = tfenv.check(tmp_path / "nowhere")
    assert (finding.code, finding.severity) == ("not-found", "error")


@pytest.mark.parametrize("kind", ["fifo", "binary", "deep", "loop"])
def test_check_survives_hostile_files(tmp_path: Path, kind: str) -> None:
    """What stands under the name of a policy is judged, and never raises or hangs."""
    path = tmp_path / "tfgpu.toml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(b"\xff\xfe\x00" * 99 if kind == "binary" else b"a = " + b"[" * 99_999)
    assert [finding.severity for finding in tfenv.check(path)] == ["error"]


def test_explain_raises_for_no_directory(tmp_path: Path) -> None:
    """A project that is no directory is the caller's mistake."""
    with pytest.raises(NotADirectoryError, match="nowhere"):
        tfenv.explain(tmp_path / "nowhere")


def test_explain_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`explain(DIR)` reads what a process that starts there would, and all of it goes into JSON."""
    for name in ("TFGPU_CONFIG", "TFGPU_SITE_CONFIG", "TFGPU_RUN", "TFGPU_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tfgpu.toml").write_text(ONE_OF_FOUR)
    explanation = tfenv.explain(tmp_path)
    limit = next(setting for setting in explanation.settings if setting.name == "memory_limit")
    assert (limit.chosen.value, limit.chosen.path, limit.chosen.line) == ("1000MiB", str(tmp_path / "tfgpu.toml"), 3)
    assert json.loads(json.dumps(explanation.as_dict()))["project"] == str(tmp_path)


def test_explain_lists_the_sites_file_and_what_tfgpu_config_replaced(tmp_path: Path, simulated_gpus: Simulated) -> None:
    """`explain().files` has both, with layer and state, and a note says which file does not apply."""
    for name in ("site.toml", "job.toml", "tfgpu.toml"):
        (tmp_path / name).write_text("[gpu]\nmemory_growth = true\n")
    program = """
        import json, tfenv
        explanation = tfenv.explain()
        files = [[file.layer, file.path.rpartition("/")[2], file.state] for file in explanation.files]
        print(json.dumps([files[1:], [finding.code for finding in explanation.findings]]))
    """
    environment = simulated_gpus(TFGPU_SITE_CONFIG="site.toml", TFGPU_CONFIG="job.toml")
    files, codes = ask(program, tmp_path, environment)
    assert [file for file in files if file[0] != "user"] == [
        ["site", "site.toml", "read"], ["project", "tfgpu.toml", "replaced"], ["project", "job.toml", "read"],
    ]  # fmt: skip
    assert codes == ["project-replaced"]


# ---- status and apply


def test_a_status_that_cannot_be_told_names_its_code(tmp_path: Path, simulated_gpus: Simulated) -> None:
    """Where the policy cannot be read for a fault of tfenv's own, `status()` says so and raises nothing."""
    program = """
        import json, sys, tfenv
        from tfenv import pipeline
        pipeline.load = None
        status = tfenv.status()
        print(json.dumps([status.summary[-17:], [finding.code for finding in status.findings]]))
    """
    assert ask(program, tmp_path, simulated_gpus()) == [" [internal-error]", ["internal-error"]]


def test_status_without_anything(tmp_path: Path, simulated_gpus: Simulated) -> None:
    """In a process without hook and framework nothing is armed, nothing governed, and that is what is printed."""
    program = """
        import json, sys, tfenv
        status = tfenv.status()
        print(json.dumps([status.as_dict()["armed"], status.governed, str(status), "tensorflow" in sys.modules]))
    """
    expected = [False, False, "tfgpu: no policy applies here (no tfgpu.toml was found)", False]
    assert ask(program, tmp_path, simulated_gpus()) == expected


@pytest.mark.parametrize(
    ("prepare", "environment", "expected"),
    [
        ("tfenv.apply()", {}, "tfgpu: when a framework is imported: GPU 1 of 4 (GPU-a1fa4e00)"),
        (
            "pass",
            {},
            "tfgpu: NOT IN FORCE: tfenv is not active in this process; run `tfenv.apply()` now. Declared: GPU 1 of 4",
        ),
        ("tfenv.apply()", {"TFGPU_DISABLE": "1"}, "tfgpu: switched off by TFGPU_DISABLE=1"),
    ],
    ids=["armed", "not active", "switched off"],
)
def test_status_tells_what_will_apply(
    prepare: str, environment: dict[str, str], expected: str, tmp_path: Path, simulated_gpus: Simulated
) -> None:
    """Before TensorFlow is imported, as in the first cell of a notebook. Nothing is imported and nothing changed."""
    (tmp_path / "tfgpu.toml").write_text("[gpu]\nvisible_devices = [1]\n")
    program = f"""
        import json, os, sys, tfenv
        {prepare}
        status = tfenv.status()
        changed = "tensorflow" in sys.modules or "CUDA_VISIBLE_DEVICES" in os.environ
        print(json.dumps([str(status), status.governed, changed]))
    """
    text, governed, changed = ask(program, tmp_path, simulated_gpus("4x24GiB") | environment)
    assert text.startswith(expected)
    assert (governed, changed) == (False, False)


@pytest.mark.parametrize("armed", [False, True])
def test_status_tells_that_a_framework_was_imported_first(
    armed: bool, tmp_path: Path, simulated_gpus: Simulated
) -> None:
    """Where TensorFlow was there before tfenv, or before the file, the status says first that nothing is in force."""
    fake_framework(tmp_path)
    program = f"""
        import json, tfenv
        if {armed}:
            tfenv.apply()
        import tensorflow
        open("tfgpu.toml", "w").write("[gpu]\\nvisible_devices = [1]\\n")
        print(json.dumps([str(tfenv.status()), tfenv.status()._repr_html_()]))
    """
    line, table = ask(program, tmp_path, simulated_gpus("4x24GiB"))
    assert line.startswith(
        "tfgpu: NOT IN FORCE: TensorFlow was imported before the policy could be applied; run `tfenv.apply()` before "
        "devices are created, or restart the process (in a notebook, the kernel). Declared: GPU 1 of 4 (GPU-a1fa4e00)"
    )
    assert armed or "GPUs that it would allow" in table


def test_apply_arms_once(tmp_path: Path, simulated_gpus: Simulated) -> None:
    """Before a framework is imported `apply` arms the hook; calling it again arms no second one."""
    program = """
        import json, sys, tfenv
        statuses = [tfenv.apply(), tfenv.apply()]
        finders = [getattr(finder, "__name__", "") for finder in sys.meta_path]
        print(json.dumps([[s.armed for s in statuses], [s.governed for s in statuses], finders.count("TfenvFinder")]))
    """
    assert ask(program, tmp_path, simulated_gpus()) == [[True, True], [False, False], 1]


@needs_tensorflow
@pytest.mark.tensorflow
@pytest.mark.parametrize("first", ["apply", "import"])
def test_apply_before_devices(tmp_path: Path, simulated_gpus: Simulated, first: str) -> None:
    """Called before or after the import of TensorFlow, but before its devices: the whole policy holds."""
    (tmp_path / "tfgpu.toml").write_text(ONE_OF_FOUR)
    steps = ["import tensorflow as tf", "tfenv.apply()"]
    lines = steps if first == "import" else steps[::-1]
    program = "\n".join(
        [
            "import json, tfenv",
            *lines,
            "gpus = len(tf.config.list_logical_devices('GPU'))",
            "again = tfenv.apply()",
            "print(json.dumps([gpus, str(again), again == tfenv.status(), again.as_dict()]))",
        ]
    )
    gpus, line, same, status = ask(program, tmp_path, simulated_gpus("4x24GiB"))
    assert gpus == 1
    assert line.startswith("tfgpu: GPU 2 of 4 (GPU-")
    assert "at most 1000.0 MiB (tfgpu.toml)" in line
    assert same
    assert (status["armed"], status["governed"], status["framework"]) == (True, True, "tensorflow")
    assert status["sources"] == [str(tmp_path / "tfgpu.toml")]
    assert [outcome["devices"][0]["limit"] for outcome in status["outcomes"]] == [1000 << 20]


def test_a_status_in_a_notebook() -> None:
    """A notebook shows a table of its own; markup and escapes in names of others are text there, and nothing else."""
    wrong = Finding("syntax", "<script>alert(1)</script>", path="/a\x1b[31m&/tfgpu.toml", line=3)
    table = Status(armed=True, framework="tensorflow", sources=("/<b>/tfgpu.toml",), findings=(wrong,))._repr_html_()
    assert [table.count(mark) for mark in ("<table>", "</table>", "<script", "<b>", "\x1b")] == [1, 1, 0, 0, 0]
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [error syntax]" in table
    assert "/a\\x1b[31m&amp;/tfgpu.toml:3" in table
    assert "&lt;b&gt;" in table


@pytest.mark.parametrize(
    ("plan", "shown"),
    [
        (None, None),
        (Plan(), "all that CUDA shows: no limit"),
        (Plan(limit=MemoryLimit(fraction=0.4)), "all that CUDA shows: at most 40%"),
        (Plan(visible="-1", devices=()), "none"),
        (Plan(devices=(PlannedDevice("3", None, MemoryLimit(bytes=8 << 30)),)), "GPU:0  (3): at most 8.0 GiB"),
    ],
)
def test_the_gpus_of_a_status_in_a_notebook(plan: Plan | None, shown: str | None) -> None:
    """The table says which GPUs there are and how much of each may be taken; nothing where nothing is planned."""
    table = Status(armed=True, plan=plan)._repr_html_()
    assert ("GPUs" in table) is (shown is not None)
    assert shown is None or f">{shown}<" in table


@needs_tensorflow
@pytest.mark.tensorflow
def test_apply_after_devices(tmp_path: Path, simulated_gpus: Simulated) -> None:
    """After TensorFlow has created its devices nothing can be applied: "too_late", once, and never an exception."""
    (tmp_path / "tfgpu.toml").write_text('on_error = "fail"\n' + ONE_OF_FOUR)
    program = """
        import json, tfenv
        import tensorflow as tf
        before = len(tf.config.list_logical_devices("GPU"))
        first, second = tfenv.apply(), tfenv.apply()
        print(json.dumps([before, [[o.status for o in s.outcomes] for s in (first, second)]]))
    """
    assert ask(program, tmp_path, simulated_gpus("4x24GiB")) == [4, [["too_late"], ["too_late"]]]


def fake_framework(folder: Path) -> None:
    """A package named tensorflow that has none of its entry points."""
    (folder / "tensorflow").mkdir()
    (folder / "tensorflow" / "__init__.py").write_text("")


@pytest.mark.parametrize("armed_first", [False, True])
def test_apply_raises_where_the_policy_asks(tmp_path: Path, simulated_gpus: Simulated, armed_first: bool) -> None:
    """With `on_error = "fail"` and a policy that cannot be put in force `apply` raises PolicyError, each time."""
    fake_framework(tmp_path)
    program = f"""
        import json, tfenv
        if {armed_first}:
            tfenv.apply()
        import tensorflow
        open("tfgpu.toml", "w").write('on_error = "fail"\\n[gpu]\\nmemory_growth = 3\\n[audit]\\nfile = "log"\\n')
        said = []
        for _ in range(2):
            try:
                tfenv.apply()
            except tfenv.PolicyError as error:
                said.append(error.findings[0].key)
        print(json.dumps(said))
    """
    assert ask(program, tmp_path, simulated_gpus()) == ["gpu.memory_growth", "gpu.memory_growth"]


def test_apply_respects_disable(tmp_path: Path, simulated_gpus: Simulated) -> None:
    """TFGPU_DISABLE=1 switches it off here, too: nothing is governed and nothing raised."""
    fake_framework(tmp_path)
    (tmp_path / "tfgpu.toml").write_text('on_error = "fail"\n[gpu]\nmemory_growth = 3\n[audit]\nfile = "log"\n')
    program = """
        import json, tfenv, tensorflow
        print(json.dumps(tfenv.apply().governed))
    """
    assert ask(program, tmp_path, simulated_gpus(TFGPU_DISABLE="1")) is False


def test_mocked_framework_is_left_alone(tmp_path: Path, simulated_gpus: Simulated) -> None:
    """A mock in sys.modules is no framework: `apply` does not touch it."""
    (tmp_path / "tfgpu.toml").write_text(ONE_OF_FOUR)
    program = """
        import json, sys
        from unittest.mock import MagicMock
        sys.modules["tensorflow"] = MagicMock()
        import tfenv
        print(json.dumps(tfenv.apply().governed))
    """
    assert ask(program, tmp_path, simulated_gpus()) is False


# ---- the shape of it


def test_values_are_frozen() -> None:
    """What the API returns is a value: nobody changes it."""
    status = Status(armed=True)
    with pytest.raises(AttributeError, match="frozen"):
        status.armed = False  # type: ignore[misc]


def test_importing_the_package_imports_nothing(simulated_gpus: Simulated, tmp_path: Path) -> None:
    """`import tfenv` alone loads no module of ours."""
    program = """
        import json, sys, tfenv
        print(json.dumps([name for name in sys.modules if name.startswith("tfenv")]))
    """
    assert ask(program, tmp_path, simulated_gpus()) == ["tfenv"]


def test_public_names() -> None:
    """Every public name of the package is there, with a docstring that says what it does."""
    assert set(tfenv.__all__) == {"PolicyError", "__version__", "apply", "check", "explain", "status"}
    assert tfenv.PolicyError is PolicyError
    assert all(getattr(tfenv, name).__doc__ for name in ("PolicyError", "apply", "check", "explain", "status"))


if TYPE_CHECKING:
    # Checked by mypy, never run: what the types are to a caller.
    assert_type(tfenv.status(), Status)
    assert_type(tfenv.apply(), Status)
    assert_type(tfenv.explain("."), Explanation)
    assert_type(tfenv.check(), tuple[Finding, ...])
    assert_type(tfenv.status().as_dict(), dict[str, object])
