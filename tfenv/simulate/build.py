"""Compiles the stub driver libraries on first use and keeps them in the user's cache."""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from tfenv.errors import TfenvError
from tfenv.values import frozen

__all__ = ["SimulationError", "library_folder"]

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread")
_TIMEOUT_S = 120


class SimulationError(TfenvError):
    """GPUs cannot be simulated here; the text says what is missing and what to do."""


@frozen
class _Library:
    """One shared library: the name programs open it by, and what it is made of."""

    soname: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()


def _maths(soname: str, cudnn: tuple[int, int] = (9, 3)) -> _Library:
    return _Library(soname, ("maths.c",), (f"-DCUDNN_MAJOR={cudnn[0]}", f"-DCUDNN_MINOR={cudnn[1]}"))


# What TensorFlow 2.16 to 2.21 opens; it lists no GPU at all when one is missing. libcuda comes first
# because libcudart is linked against it. cuDNN 8 is for 2.16 and 2.17, cuDNN 9 for all later ones.
_LIBRARIES = (
    _Library("libcuda.so.1", ("driver_devices.c", "driver_memory.c", "driver_work.c", "machine.c")),
    _Library("libcudart.so.12", ("runtime.c",), ("-Wl,-rpath,$ORIGIN", "-L.", "-l:libcuda.so.1")),
    _Library("libnvidia-ml.so.1", ("nvml.c", "machine.c")),
    _maths("libcudnn.so.8", (8, 9)),
    _maths("libcudnn.so.9"),
    _maths("libcublas.so.12"),
    _maths("libcublasLt.so.12"),
    _maths("libcufft.so.11"),
    _maths("libcusolver.so.11"),
    _maths("libcusparse.so.12"),
)


def library_folder() -> Path:
    """The folder of the stub libraries, for LD_LIBRARY_PATH; compiles them if nobody has yet.

    They lie in `$XDG_CACHE_HOME/tfgpu` or `~/.cache/tfgpu`. Where that is missing, not writable or
    not the caller's own, they go to a private temporary folder that is removed at exit.

    Raises:
        SimulationError: There is no C compiler, or it failed; the text holds its output.
    """
    compiler = _find_compiler(os.environ)
    parent = _cache_folder(os.environ) or _temporary_folder()
    folder = parent / f"simulate-{_fingerprint(compiler)}"
    if not _is_private(folder):
        _build(compiler, folder)
    return folder


# ---- the compiler


def _find_compiler(environ: Mapping[str, str]) -> tuple[str, ...]:
    """$CC with its arguments, or cc; the first word as an absolute path."""
    command = shlex.split(environ.get("CC", "")) or ["cc"]
    path = shutil.which(command[0], path=environ.get("PATH", os.defpath))
    if path is None:
        raise SimulationError(
            f'no C compiler: "{command[0]}" is not on PATH; simulated GPUs are compiled on first use. '
            'Install one ("apt install gcc libc6-dev", "dnf install gcc", "conda install gcc"), or name yours in CC'
        )
    return (os.path.abspath(path), *command[1:])


def _fingerprint(compiler: Sequence[str]) -> str:
    """Changes whenever what would be built changes."""
    status = os.stat(compiler[0])
    digest = hashlib.sha256()
    digest.update(repr((compiler, status.st_size, status.st_mtime_ns, platform.machine())).encode())
    digest.update(repr((_FLAGS, _LIBRARIES)).encode())
    for source in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


# ---- where the libraries lie


def _cache_folder(environ: Mapping[str, str]) -> Path | None:
    """The user's own cache folder for tfgpu, made if need be; None when there is none to trust."""
    root = _cache_root(environ)
    if root is None:
        return None
    folder = root / "tfgpu"
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    usable = _keeps_others_out(root) and _is_private(folder) and os.access(folder, os.W_OK)
    return folder if usable else None


def _cache_root(environ: Mapping[str, str]) -> Path | None:
    configured = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(configured):
        return Path(configured)
    try:
        home = Path.home()
    except RuntimeError:  # neither $HOME nor a passwd entry, as in some containers
        return None
    return home / ".cache" if home.is_absolute() else None


def _is_private(folder: Path) -> bool:
    """A real folder that is the caller's, which nobody else can write: who can, could run code as us."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not writable


def _keeps_others_out(folder: Path) -> bool:
    """Whether nobody but its owner can exchange what lies in a folder."""
    mode = folder.stat().st_mode
    return not mode & stat.S_IWOTH or bool(mode & stat.S_ISVTX)


@cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="tfgpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# ---- building


def _build(compiler: Sequence[str], folder: Path) -> None:
    """Compile beside the final place and rename: two builders at once are fine, a killed one leaves no half."""
    try:
        workshop = Path(tempfile.mkdtemp(prefix="build-", dir=folder.parent))
    except OSError as error:
        raise SimulationError(f"cannot write the simulated GPUs' libraries to {folder.parent}: {error}") from error
    try:
        for library in _LIBRARIES:
            _compile(compiler, library, workshop)
        _move_into_place(workshop, folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _compile(compiler: Sequence[str], library: _Library, workshop: Path) -> None:
    sources = [str(_SOURCES / source) for source in library.sources]
    soname = f"-Wl,-soname,{library.soname}"
    command = [*compiler, *_FLAGS, soname, "-o", library.soname, *sources, *library.flags]
    try:
        result = subprocess.run(
            command, cwd=workshop, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SimulationError(f"the C compiler {compiler[0]} cannot be used: {error}") from error
    if result.returncode != 0:
        raise SimulationError(_failure(compiler, library, result))


def _failure(compiler: Sequence[str], library: _Library, result: subprocess.CompletedProcess[str]) -> str:
    output = (result.stderr + result.stdout).strip() or "no output"
    return (
        f"{shlex.join(compiler)} could not compile {library.soname} of the simulated GPUs "
        f"(exit status {result.returncode}); a C compiler with its standard headers is needed "
        f'("apt install gcc libc6-dev"), another one can be named in CC. It said:\n{output}'
    )


def _move_into_place(workshop: Path, folder: Path) -> None:
    try:
        workshop.rename(folder)
    except OSError as error:
        if not _is_private(folder):  # otherwise another process was faster, with the same result
            text = f"{folder} is in the way of the simulated GPUs' libraries, remove it: {error}"
            raise SimulationError(text) from error
