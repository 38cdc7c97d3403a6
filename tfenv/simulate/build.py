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

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread")
_TIMEOUT_S = 120
_SYMBOLS = _SOURCES / "symbols.dat"
_REFUSED = "refused.c"
_VERSION = "version.map"
#: The library for LD_PRELOAD.
PRELOADED = "libtfgpu-simulated.so"


class SimulationError(TfenvError):
    """GPUs cannot be simulated here. The text says what is missing and what to do."""


@frozen
class _StubLibrary:
    """One shared library: the name programs open it by, and what it is made of.

    Attributes:
        soname: Its name.
        sources: Files in C.
        flags: More arguments for the compiler.
        symbols: The part of symbols.dat with what PyTorch links of it.
        version: The version of its symbols. PyTorch asks for it. "": they have none.
    """

    soname: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()
    symbols: str = ""
    version: str = ""


def _define_runtime(major: int) -> _StubLibrary:
    flags = (f"-DCUDART_MAJOR={major}", "-Wl,-rpath,$ORIGIN", "-L.", "-l:libcuda.so.1", "-ldl")
    soname = f"libcudart.so.{major}"
    return _StubLibrary(soname, ("runtime.c", "runtime_work.c"), flags, version=soname)


def _define_maths(
    soname: str, *, toolkit: int = 12, cudnn: tuple[int, int] = (9, 30), source: str = "maths.c", version: str = ""
) -> _StubLibrary:
    flags = (f"-DCUDNN_MAJOR={cudnn[0]}", f"-DCUDNN_MINOR={cudnn[1]}", f"-DTOOLKIT_MAJOR={toolkit}")
    symbols = soname.removeprefix("lib").partition(".")[0]
    return _StubLibrary(soname, (source,), flags, symbols, version or soname)


# What TensorFlow 2.16 to 2.22, JAX and PyTorch open. TensorFlow and JAX list no GPU at all when one is missing, and
# PyTorch cannot be imported. libcuda comes first because libcudart is linked against it. cuDNN 8 is for TensorFlow 2.16
# and 2.17.
_LIBRARIES = (
    _StubLibrary(
        "libcuda.so.1",
        ("driver_devices.c", "driver_memory.c", "driver_virtual.c", "driver_work.c", "machine.c", "cgroups.c"),
    ),
    _StubLibrary("libnvidia-ml.so.1", ("nvml.c", "machine.c", "cgroups.c")),
    _StubLibrary(PRELOADED, ("preload.c", "machine.c", "cgroups.c"), ("-ldl",)),
    # CUDA 12
    _define_runtime(12),
    _define_maths("libcublas.so.12"),
    _define_maths("libcublasLt.so.12"),
    _define_maths("libcufft.so.11"),
    _define_maths("libcusolver.so.11"),
    _define_maths("libcupti.so.12", source="profiler.c"),
    _define_maths("libnvrtc.so.12", source="compiler.c"),
    # CUDA 13
    _define_runtime(13),
    _define_maths("libcublas.so.13", toolkit=13),
    _define_maths("libcublasLt.so.13", toolkit=13),
    _define_maths("libcufft.so.12", toolkit=13),
    _define_maths("libcusolver.so.12", toolkit=13),
    _define_maths("libcupti.so.13", toolkit=13, source="profiler.c"),
    _define_maths("libnvrtc.so.13", toolkit=13, source="compiler.c"),
    # Both
    _define_maths("libcudnn.so.8", cudnn=(8, 9)),
    _define_maths("libcudnn.so.9"),
    _define_maths("libcusparse.so.12"),
    _define_maths("libcusparseLt.so.0"),
    _define_maths("libcurand.so.10"),
    _define_maths("libnccl.so.2", source="communication.c"),
    _define_maths("libcufile.so.0"),
    _define_maths("libnvshmem_host.so.3", version="NVSHMEM"),
)


def build_libraries() -> Path:
    """Compile the stub libraries, unless somebody has already.

    They lie in `$XDG_CACHE_HOME/tfgpu` or `~/.cache/tfgpu`. Where that is missing, not writable or
    not the caller's own, they go to a private temporary folder that is removed at exit.

    Returns:
        Their folder, for LD_LIBRARY_PATH.

    Raises:
        SimulationError: There is no C compiler, or it failed. The text holds its output.
    """
    compiler = _find_compiler(os.environ)
    parent = _make_cache_folder(os.environ) or _make_temporary_folder()
    folder = parent / f"simulate-{_compute_fingerprint(compiler)}"
    if not _is_private(folder):
        _build(compiler, folder)
    return folder


# ---- the compiler


def _find_compiler(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return $CC with its arguments, or cc. The first word is an absolute path."""
    command = shlex.split(environ.get("CC", "")) or ["cc"]
    path = shutil.which(command[0], path=environ.get("PATH", os.defpath))
    if path is None:
        raise SimulationError(
            f'no C compiler: "{command[0]}" is not on PATH; simulated GPUs are compiled on first use. '
            'Install one ("apt install gcc libc6-dev", "dnf install gcc", "conda install gcc"), or set CC to yours'
        )
    return (os.path.abspath(path), *command[1:])


def _compute_fingerprint(compiler: Sequence[str]) -> str:
    """Return a hash that changes whenever what would be built changes."""
    status = os.stat(compiler[0])
    digest = hashlib.sha256()
    digest.update(repr((compiler, status.st_size, status.st_mtime_ns, platform.machine())).encode())
    digest.update(repr((_FLAGS, _LIBRARIES)).encode())
    for source in (*sorted(_SOURCES.glob("*.[ch]")), _SYMBOLS):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


# ---- where the libraries lie


def _make_cache_folder(environ: Mapping[str, str]) -> Path | None:
    """Return the user's own cache folder for tfgpu, made if need be. None when there is none to trust."""
    root = _find_cache_root(environ)
    if root is None:
        return None
    folder = root / "tfgpu"
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    is_usable = _is_protected(root) and _is_private(folder) and os.access(folder, os.W_OK)
    return folder if is_usable else None


def _find_cache_root(environ: Mapping[str, str]) -> Path | None:
    configured = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(configured):
        return Path(configured)
    try:
        home = Path.home()
    except RuntimeError:  # neither $HOME nor a passwd entry, as in some containers
        return None
    return home / ".cache" if home.is_absolute() else None


def _is_private(folder: Path) -> bool:
    """Tell whether this is a folder of the caller's that nobody else can write. Who can, could run code as us."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    is_writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not is_writable


def _is_protected(folder: Path) -> bool:
    """Tell whether nobody but its owner can exchange what lies in a folder."""
    mode = folder.stat().st_mode
    return not mode & stat.S_IWOTH or bool(mode & stat.S_ISVTX)


@cache
def _make_temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="tfgpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# ---- building


def _build(compiler: Sequence[str], folder: Path) -> None:
    """Compile beside the final place, then rename. Two may build at once, and a killed one leaves nothing half."""
    try:
        workshop = Path(tempfile.mkdtemp(prefix="build-", dir=folder.parent))
    except OSError as error:
        raise SimulationError(f"cannot write the stub libraries to {folder.parent}: {error}") from error
    try:
        for library in _LIBRARIES:
            _compile(compiler, library, workshop)
        for generated in (_REFUSED, _VERSION):
            (workshop / generated).unlink()
        _move_into_place(workshop, folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _compile(compiler: Sequence[str], library: _StubLibrary, workshop: Path) -> None:
    sources = [str(_SOURCES / source) for source in library.sources]
    options = [f"-Wl,-soname,{library.soname}"]
    if library.symbols:
        (workshop / _REFUSED).write_text(_write_refused(library.symbols), encoding="ascii")
        sources.append(_REFUSED)
    if library.version:
        (workshop / _VERSION).write_text(f"{library.version} {{ global: *; }};", encoding="ascii")
        options.append(f"-Wl,--version-script={_VERSION}")
    command = [*compiler, *_FLAGS, *options, "-o", library.soname, *sources, *library.flags]
    try:
        result = subprocess.run(
            command, cwd=workshop, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SimulationError(f"cannot run the C compiler {compiler[0]}: {error}") from error
    if result.returncode != 0:
        raise SimulationError(_describe_failure(compiler, library, result))


def _write_refused(part: str) -> str:
    """Return C code with the symbols in one part of symbols.dat. A function of the same name takes its place."""
    for paragraph in _SYMBOLS.read_text(encoding="ascii").split("\n\n"):
        title, result, *names = paragraph.split()
        if title == f"[{part}]":
            attributes = '__attribute__((visibility("default"), weak, alias("answer")))'
            lines = [f"int answer(void) {{ return {result}; }}", *(f"int {name}(void) {attributes};" for name in names)]
            return "\n".join(lines)
    return "struct nothing;"


def _describe_failure(compiler: Sequence[str], library: _StubLibrary, result: subprocess.CompletedProcess[str]) -> str:
    output = (result.stderr + result.stdout).strip() or "no output"
    return (
        f"{shlex.join(compiler)} could not compile {library.soname} of the simulated GPUs "
        f"(exit status {result.returncode}). Install a C compiler with its standard headers "
        f'("apt install gcc libc6-dev"), or set CC to another one. Its output:\n{output}'
    )


def _move_into_place(workshop: Path, folder: Path) -> None:
    try:
        workshop.rename(folder)
    except OSError as error:
        if not _is_private(folder):  # otherwise another process was faster, with the same result
            text = f"cannot put the stub libraries into {folder}: {error}; remove it and try again"
            raise SimulationError(text) from error
