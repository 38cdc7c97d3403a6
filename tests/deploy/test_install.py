"""Covering an interpreter for everybody: in a mount namespace of its own, on Debian's real Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tfenv.deploy.install import _BEGIN, _END, _list_closed, _remove_block, find_closed_path

REPOSITORY = Path(__file__).parents[2]
DEBIAN = Path("/usr/bin/python3")
VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"

needs_debian = pytest.mark.skipif(
    os.geteuid() != 0 or not DEBIAN.exists() or not list(Path("/etc").glob("python3.*/sitecustomize.py")),
    reason="only root can mount, and this takes Debian's Python with its sitecustomize",
)

#: Shows what a program of a foreign environment sees, after it imported a framework.
PROGRAM = """
import os, sys
import tensorflow
ours = [name for name in ("tomli", "structlog", "jsonschema", "pynvml") if name in sys.modules]
import tomli
assert tomli.VERSION == "the program's own"
print(os.environ.get("CUDA_VISIBLE_DEVICES"), ours, "tfenv" in sys.modules)
"""

#: What every story begins with; $HERE is the test's folder. /opt and /etc/python3.X are this namespace's own.
BEGIN = """
set -e
mount -t tmpfs tmpfs /opt
cp -a "$HERE/opt/." /opt/
chown -R root:root /opt; chmod 755 /opt
mkdir /opt/python /opt/packages; mount --bind "$PYTHON" /opt/python; mount --bind "$PACKAGES" /opt/packages
ETC=$(dirname "$(ls /etc/python3.*/sitecustomize.py | head -1)")
cp -a "$ETC" "$HERE/etc"; mount --bind "$HERE/etc" "$ETC"
SITE="$ETC/sitecustomize.py"; cp "$SITE" "$HERE/original"
tfgpu() { /opt/tfenv/bin/python -m tfenv "$@"; }
say() { echo "$1: $("$HERE/project/bin/python" "$HERE/project/program.py" 2>&1)"; }
cd "$HERE/project"
"""

COVERED = """
say before
tfgpu install --system --python /usr/bin/python3 --dry-run | grep -c '^+' > "$HERE/dry"
cmp -s "$SITE" "$HERE/original" && echo "dry run: unchanged"
tfgpu install --system --python /usr/bin/python3 2>/dev/null
cp "$SITE" "$HERE/installed"
tfgpu install --system --python "$HERE/project/bin/python" 2>/dev/null
cmp -s "$SITE" "$HERE/installed" && echo "again: unchanged"
say installed
tfgpu doctor --no-tensorflow --python "$HERE/project/bin/python" | grep '^ok *hook' | sed "s#$HERE##"
tfgpu uninstall --system --python /usr/bin/python3 2>/dev/null
cmp -s "$SITE" "$HERE/original" && echo "uninstalled: as before"
say after
"""

#: What is broken, and mended again, of an install: the environment of tfenv, its package, its hook, its interpreter.
BROKEN = {
    "the environment": ("mv /opt/tfenv /opt/gone", "mv /opt/gone /opt/tfenv"),
    "the package": ("mv $LIB/tfenv $LIB/gone", "mv $LIB/gone $LIB/tfenv"),
    "the package's code": ("mv $LIB/tfenv/runtime /opt/gone", "mv /opt/gone $LIB/tfenv/runtime"),
    "one module": ("mv $LIB/tfenv/runtime/enforce.py /opt/gone", "mv /opt/gone $LIB/tfenv/runtime/enforce.py"),
    "the hook": ("mv $BOOT /opt/gone", "mv /opt/gone $BOOT"),
    "half of the hook": ("cp $BOOT /opt/gone; head -c 3000 /opt/gone > $BOOT", "mv /opt/gone $BOOT"),
    "all of its text": ("mv $BOOT /opt/gone; : > $BOOT", "mv /opt/gone $BOOT"),
    "a folder for it": ("mv $BOOT /opt/gone; mkdir $BOOT", "rmdir $BOOT; mv /opt/gone $BOOT"),
    "a hook that exits": ("mv $BOOT /opt/gone; echo 'raise SystemExit(3)' > $BOOT", "mv /opt/gone $BOOT"),
    "not for others": ("chmod 0 $BOOT", "chmod 644 $BOOT"),
    "the interpreter": ("mv /opt/tfenv/bin /opt/gone", "mv /opt/gone /opt/tfenv/bin"),
    "no way in": ("chmod 700 /opt/tfenv", "chmod 755 /opt/tfenv"),
}
#: Of those, what leaves tfenv there and makes it impossible to load.
ONLY_BROKEN = (
    "one module",
    "half of the hook",
    "all of its text",
    "a folder for it",
    "a hook that exits",
    "the interpreter",
)
_BREAK = """
{do}
echo "{name}: $( ( {somebody} /usr/bin/python3 -c 'print(1)'; say program ) 2>&1 | tr '\\n' ' ')"
{undo}
"""


def prepare(here: Path) -> None:
    """An environment of tfenv's own, and a project's of Debian's Python that knows nothing of it."""
    own = here / "opt" / "tfenv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(own)], check=True)
    site = next((own / "lib").glob("python3*")) / "site-packages"
    (site / "dependencies.pth").write_text("/opt/packages\n")
    (own / "bin" / "python").unlink()
    (own / "bin" / "python").symlink_to(f"/opt/python/bin/{VERSION}")
    (own / "pyvenv.cfg").write_text("home = /opt/python/bin\ninclude-system-site-packages = false\n")
    shutil.copytree(REPOSITORY / "tfenv", site / "tfenv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "schemas", site / "tfenv" / "schemas")
    shutil.copy(REPOSITORY / "tfenv" / "runtime" / "finder.py", site / "_tfenv_boot.py")
    project = here / "project"
    subprocess.run([str(DEBIAN), "-m", "venv", "--without-pip", str(project)], check=True)
    (project / "tensorflow").mkdir()
    (project / "tensorflow" / "__init__.py").write_text("")
    (project / "program.py").write_text(PROGRAM)
    own_packages = next((project / "lib").glob("python3*")) / "site-packages"
    (own_packages / "tomli.py").write_text('VERSION = "the program\'s own"\n')
    project.parent.chmod(0o755)
    (project / "tfgpu.toml").write_text('[gpu]\nvisible_devices = "none"\n[audit]\nstderr = "none"\n')


def tell(story: str, here: Path) -> tuple[list[str], str]:
    """What a story prints, and what it complains about."""
    prepare(here)
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", BEGIN + story],
        # Users must be able to read the interpreter and the packages, which may lie in root's home.
        env={
            "PATH": os.environ["PATH"],
            "HERE": str(here),
            "HOME": "/root",
            "PYTHON": sys.base_prefix,
            "PACKAGES": sysconfig.get_path("purelib"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "unshare failed" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    return done.stdout.splitlines(), done.stderr


@needs_debian
def test_every_environment_of_an_interpreter_is_covered_and_left_as_it_was(tmp_path: Path) -> None:
    """Installed twice it is one block; programs keep their own versions of what tfenv needs; nothing remains."""
    lines, stderr = tell(COVERED, tmp_path)
    (doctor,) = [line for line in lines if line.startswith("ok ")]
    assert doctor.endswith(f"by `tfgpu install --system` from /opt/tfenv/lib/{VERSION}/site-packages")
    assert lines == [
        "before: None [] False",
        "dry run: unchanged",
        "again: unchanged",
        "installed: -1 [] True",
        doctor,
        "uninstalled: as before",
        "after: None [] False",
    ], stderr
    assert int((tmp_path / "dry").read_text()) > 5


@needs_debian
def test_an_install_that_is_gone_is_silent_and_a_broken_one_is_said(tmp_path: Path) -> None:
    """Python starts whatever is gone, cut or closed. What is there and broken is said at the framework's import."""
    somebody = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    steps = [_BREAK.format(name=name, do=do, undo=undo, somebody=somebody) for name, (do, undo) in BROKEN.items()]
    story = "BOOT=$(ls /opt/tfenv/lib/python3*/site-packages/_tfenv_boot.py); LIB=$(dirname $BOOT)\nset +e\n"
    install = "tfgpu install --system --python /usr/bin/python3 2>/dev/null\n"
    lines, stderr = tell(f"{story}{install}{''.join(steps)}say mended\n", tmp_path)
    assert lines[-1] == "mended: -1 [] True", stderr
    told = dict(line.rstrip().split(": ", 1) for line in lines[:-1])
    assert list(told) == list(BROKEN)
    for name, line in told.items():
        # Root, who runs the program, may read what is not for others.
        governed = name in ("not for others", "no way in")
        seen = ("-1 [] True",) if governed else ("None [] False", "None [] True")
        if name in ONLY_BROKEN:
            assert line.startswith("1 program: tfgpu: "), line
            assert line.count("no policy is applied") == 1
            assert " [internal-error]" in line
            assert line.endswith(seen)
            continue
        assert line in {f"1 program: {text}" for text in seen}, name


USERS = """
chmod -R go-rwx /opt/tfenv
tfgpu install --system --python /usr/bin/python3 2>&1 || echo "refused: $?"
cmp -s "$SITE" "$HERE/original" && echo "nothing was written"
chmod -R go+rX /opt/tfenv
tfgpu install --system --python /usr/bin/python3 2>/dev/null
user() { setpriv --reuid=5001 --regid=5001 --clear-groups "$HERE/project/bin/python" "$HERE/project/program.py" 2>&1; }
echo "open: $(user)"
chmod 700 /opt/tfenv
echo "closed: $(user | tr '\\n' ' ')"
tfgpu doctor --no-tensorflow --python "$HERE/project/bin/python" | grep -A1 'other users cannot read'
"""


WORDS = """
set +e
tfgpu uninstall --system --python /usr/bin/python3 2>&1
tfgpu install --system --python /usr/bin/python3 2>&1
tfgpu install --system --python /usr/bin/python3 2>&1
tfgpu uninstall --system --python /usr/bin/python3 2>&1
: > "$SITE"
tfgpu install --system --python /usr/bin/python3 2>&1
tfgpu uninstall --system --python /usr/bin/python3 2>&1
[ -e "$SITE" ] || echo "the file is gone"
touch "$SITE"
chmod g+w /opt/tfenv; tfgpu install --system --python /usr/bin/python3 2>&1; echo "code $?"
chown 65534 /opt/tfenv; tfgpu install --system --python /usr/bin/python3 2>&1
for command in install uninstall; do
    for path in /nope /etc /bin/sh "$SITE"; do tfgpu $command --system --python $path 2>&1; echo "code $?"; done
done
"""


@needs_debian
def test_what_it_says_is_what_it_did(tmp_path: Path) -> None:
    """Each run names the file, and tells a removed block from a removed file. What is refused says what to do."""
    lines, stderr = tell(WORDS, tmp_path)
    site = str(next(Path("/etc").glob("python3.*/sitecustomize.py")))
    assert lines[:7] == [
        f"tfgpu uninstall: found no tfenv block in {site}",
        f"tfgpu install: wrote tfenv's block into {site}",
        f"tfgpu install: tfenv's block is already in {site}",
        f"tfgpu uninstall: removed tfenv's block from {site}",
        f"tfgpu install: wrote tfenv's block into {site}",
        f"tfgpu uninstall: removed {site}, which contained only tfenv's block",
        "the file is gone",
    ], stderr
    package = f"/opt/tfenv/lib/{VERSION}/site-packages"
    why = f"tfgpu: users other than root can change /opt/tfenv, and every user's Python would run the code in {package}"
    where = "or install tfenv into a directory that only root can write to, such as /opt/tfenv"
    assert lines[7:10] == [
        f"{why}; run `chmod go-w /opt/tfenv`, {where}",
        "code 1",
        f"{why}; run `chmod go-w /opt/tfenv` and `chown root /opt/tfenv`, {where}",
    ]
    reasons = {"/nope": "No such file or directory", "/etc": "Permission denied", "/bin/sh": "it is another program"}
    reasons[site] = "Permission denied"
    assert lines[10:] == [
        line
        for command in ("install", "uninstall")
        for path, reason in reasons.items()
        for line in (f"tfgpu {command}: cannot run {path} as a Python interpreter: {reason}", "code 2")
    ]


@needs_debian
def test_a_directory_that_is_everybodys_is_left_so(tmp_path: Path) -> None:
    """Below a sticky directory, such as /tmp, you are told to install elsewhere, and not to close the directory."""
    story = "set +e\nchmod 1777 /opt; tfgpu install --system --python /usr/bin/python3 --dry-run 2>&1; echo code $?"
    lines, stderr = tell(story, tmp_path)
    package = f"/opt/tfenv/lib/{VERSION}/site-packages"
    why = f"tfgpu: users other than root can change /opt, and every user's Python would run the code in {package}"
    where = "install tfenv into a directory that only root can write to, such as /opt/tfenv"
    assert lines == [f"{why}; {where}", "code 1"], stderr


@needs_debian
def test_an_environment_that_only_root_can_read_covers_nobody(tmp_path: Path) -> None:
    """It is refused. One that is closed later is named by doctor, and said in the programs of users."""
    for folder in (tmp_path, *list(tmp_path.parents)[:-1]):
        folder.chmod(folder.stat().st_mode | 0o011)
    lines, stderr = tell(USERS, tmp_path)
    assert "other users cannot read /opt/tfenv" in lines[0], stderr
    assert lines[0].endswith("so the policy would apply only to root; run `chmod -R go+rX /opt/tfenv`"), stderr
    assert lines[1:4] == ["refused: 1", "nothing was written", "open: -1 [] True"], stderr
    assert lines[4].startswith("closed: tfgpu: tfenv cannot be loaded, no policy is applied: PermissionError"), stderr
    assert lines[4].endswith("None [] False ")
    assert "other users cannot read /opt/tfenv" in lines[5]


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
    assert "users other than root can change " in done.stderr
    assert "such as /opt/tfenv" in done.stderr


def test_what_others_cannot_read_is_named(tmp_path: Path) -> None:
    """The topmost closed folder, or the file itself. Nothing is said where everybody may read."""
    module = tmp_path / "opt" / "tfenv" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    for path in (tmp_path, *list(tmp_path.parents)[:-1]):
        if not path.stat().st_mode & 0o001:
            assert find_closed_path((str(module),)) is not None
            break
    assert str(module.parent) not in list(_list_closed(str(module)))
    module.parent.chmod(0o700)
    assert str(module.parent) in list(_list_closed(str(module)))
    module.parent.chmod(0o755)
    module.chmod(0o600)
    assert str(module) in list(_list_closed(str(module)))


@pytest.mark.parametrize("rest", ["", "import apport\n", "a = 1\nb = 2\n"])
def test_the_block_alone_is_removed(rest: str) -> None:
    """What stood before and after it stays, byte for byte; a block that was cut is left alone."""
    assert _remove_block(f"{rest}{_BEGIN}x = 1\n{_END}{rest}") == rest + rest
    assert _remove_block(f"{rest}{_BEGIN}x = 1\n") == f"{rest}{_BEGIN}x = 1\n"
