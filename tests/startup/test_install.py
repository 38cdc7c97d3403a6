"""Covering an interpreter for everybody: in a mount namespace of its own, on Debian's real Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tfenv.startup.install import _BEGIN, _END, _without_block

REPOSITORY = Path(__file__).parents[2]
DEBIAN = Path("/usr/bin/python3")

needs_debian = pytest.mark.skipif(
    os.geteuid() != 0 or not DEBIAN.exists() or not list(Path("/etc").glob("python3.*/sitecustomize.py")),
    reason="only root can mount, and this takes Debian's Python with its sitecustomize",
)

#: Shows what a program of a foreign environment sees, after it imported a framework.
PROGRAM = """
import os, sys
import tensorflow
ours = [name for name in ("tomli", "structlog", "jsonschema", "pynvml") if name in sys.modules]
print(os.environ.get("CUDA_VISIBLE_DEVICES"), ours, "tfenv" in sys.modules)
"""

#: The steps of one story; $HERE is the test's folder. /opt and /etc/python3.X are this namespace's own.
STORY = """
set -e
mount -t tmpfs tmpfs /opt
cp -a /opt.ready/. /opt/ 2>/dev/null || cp -a "$HERE/opt/." /opt/
chown -R root:root /opt; chmod 755 /opt
ETC=$(dirname "$(ls /etc/python3.*/sitecustomize.py | head -1)")
cp -a "$ETC" "$HERE/etc"; mount --bind "$HERE/etc" "$ETC"
SITE="$ETC/sitecustomize.py"; cp "$SITE" "$HERE/original"
tfgpu() { /opt/tfenv/bin/python -m tfenv "$@"; }
say() { echo "$1: $("$HERE/project/bin/python" "$HERE/project/program.py" 2>&1)"; }
cd "$HERE/project"
say before
tfgpu install --system --python /usr/bin/python3 --dry-run | grep -c '^+' > "$HERE/dry"
cmp -s "$SITE" "$HERE/original" && echo "dry run: unchanged"
tfgpu install --system --python /usr/bin/python3 2>/dev/null
cp "$SITE" "$HERE/installed"
tfgpu install --system --python "$HERE/project/bin/python" 2>/dev/null
cmp -s "$SITE" "$HERE/installed" && echo "again: unchanged"
say installed
tfgpu doctor --no-tensorflow --python "$HERE/project/bin/python" | grep '^ok *hook' | sed "s#$HERE##"
mv /opt/tfenv /opt/gone
say gone
mv /opt/gone /opt/tfenv
tfgpu uninstall --system --python /usr/bin/python3 2>/dev/null
cmp -s "$SITE" "$HERE/original" && echo "uninstalled: as before"
say after
"""


def prepare(here: Path) -> None:
    """An environment of tfenv's own, and a project's of Debian's Python that knows nothing of it."""
    own = here / "opt" / "tfenv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(own)], check=True)
    site = next((own / "lib").glob("python3*")) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copytree(REPOSITORY / "tfenv", site / "tfenv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "schemas", site / "tfenv" / "schemas")
    shutil.copy(REPOSITORY / "tfenv" / "startup" / "boot.py", site / "_tfenv_boot.py")
    project = here / "project"
    subprocess.run([str(DEBIAN), "-m", "venv", "--without-pip", str(project)], check=True)
    (project / "tensorflow").mkdir()
    (project / "tensorflow" / "__init__.py").write_text("")
    (project / "program.py").write_text(PROGRAM)
    (project / "tfgpu.toml").write_text('[gpu]\nvisible_devices = "none"\n[audit]\nstderr = "none"\n')


@needs_debian
def test_every_environment_of_an_interpreter_is_covered_and_left_as_it_was(tmp_path: Path) -> None:
    """Installed twice it is one block, its environments are governed by the standard library alone, nothing remains."""
    prepare(tmp_path)
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", STORY],
        env={"PATH": os.environ["PATH"], "HERE": str(tmp_path), "HOME": "/root"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "unshare failed" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    version = "python" + ".".join(str(part) for part in sys.version_info[:2])
    (doctor,) = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert doctor.endswith(f"by `tfgpu install --system` from /opt/tfenv/lib/{version}/site-packages")
    assert done.stdout.splitlines() == [
        "before: None [] False",
        "dry run: unchanged",
        "again: unchanged",
        "installed: -1 [] True",
        doctor,
        "gone: None [] False",
        "uninstalled: as before",
        "after: None [] False",
    ], done.stderr
    assert int((tmp_path / "dry").read_text()) > 5


def test_what_others_can_change_is_not_installed_for_everybody(tmp_path: Path) -> None:
    """Code that runs in every user's Python must be root's own: /tmp is not."""
    package = tmp_path / "site"
    shutil.copytree(REPOSITORY / "tfenv", package / "tfenv", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "tfenv", "install", "--system", "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "can be changed by others than root" in done.stderr


@pytest.mark.parametrize("rest", ["", "import apport\n", "a = 1\nb = 2\n"])
def test_the_block_alone_is_removed(rest: str) -> None:
    """What stood before and after it stays, byte for byte; a block that was cut is left alone."""
    assert _without_block(f"{rest}{_BEGIN}x = 1\n{_END}{rest}") == rest + rest
    assert _without_block(f"{rest}{_BEGIN}x = 1\n") == f"{rest}{_BEGIN}x = 1\n"
