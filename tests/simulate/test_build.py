"""Compiling the stub libraries: real compilers, real folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tfenv.simulate import build

SONAMES = {
    "libcuda.so.1", "libnvidia-ml.so.1", "libtfgpu-simulated.so",
    "libcudart.so.12", "libcublas.so.12", "libcublasLt.so.12", "libcufft.so.11", "libcusolver.so.11",
    "libcupti.so.12", "libnvrtc.so.12",
    "libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcufft.so.12", "libcusolver.so.12",
    "libcupti.so.13", "libnvrtc.so.13",
    "libcudnn.so.8", "libcudnn.so.9", "libcusparse.so.12", "libcusparseLt.so.0", "libcurand.so.10", "libnccl.so.2",
    "libcufile.so.0", "libnvshmem_host.so.3",
}  # fmt: skip
PROGRAM = """
import json, os
from tfenv.simulate.build import SimulationError, build_libraries
try:
    folder = build_libraries()
    print(json.dumps([str(folder), sorted(os.listdir(folder))]))
except SimulationError as error:
    print(json.dumps(str(error)))
"""


def build_in_child(cache: Path, **variables: str) -> tuple[str, set[str]]:
    answer = run_child({**os.environ, "XDG_CACHE_HOME": str(cache), **variables})
    assert isinstance(answer, list), answer
    return answer[0], set(answer[1])


def fail_in_child(cache: Path, **variables: str) -> str:
    answer = run_child({**os.environ, "XDG_CACHE_HOME": str(cache), **variables})
    assert isinstance(answer, str), answer
    return answer


def run_child(env: dict[str, str]) -> object:
    env = {**env, "PYTHONPATH": str(Path(build.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def write_compiler(tmp_path: Path, body: str) -> str:
    compiler = tmp_path / "fake-cc"
    compiler.write_text(f"#!/bin/sh\n{body}\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_builds_every_library_that_frameworks_open(tmp_path: Path) -> None:
    """The first call compiles all libraries, without a warning, into the user's cache and nowhere else."""
    folder, files = build_in_child(tmp_path / "cache")
    assert files == SONAMES
    assert Path(folder).parent == tmp_path / "cache" / "tfgpu"
    assert [entry.name for entry in (tmp_path / "cache" / "tfgpu").iterdir()] == [Path(folder).name]


def test_warnings_are_errors(tmp_path: Path) -> None:
    """The compiler is asked for all warnings, and to treat them as errors, for each library."""
    said = tmp_path / "said"
    compiler = write_compiler(tmp_path, f'echo "$@" >> {said}\nexec cc "$@"')
    build_in_child(tmp_path / "cache", CC=compiler)
    calls = said.read_text().splitlines()
    assert len(calls) == len(SONAMES)
    assert all({"-Wall", "-Wextra", "-Werror"} <= set(call.split()) for call in calls)


def test_second_call_compiles_nothing(tmp_path: Path) -> None:
    """Once built, the libraries are found again without running the compiler."""
    said = tmp_path / "said"
    compiler = write_compiler(tmp_path, f'echo called >> {said}\nexec cc "$@"')
    first = build_in_child(tmp_path / "cache", CC=compiler)
    said.unlink()
    assert build_in_child(tmp_path / "cache", CC=compiler) == first
    assert not said.exists()


@pytest.mark.exhaustive
def test_another_compiler_builds_anew(tmp_path: Path) -> None:
    """$CC is honoured, with its arguments, and what another compiler built is not taken for its work."""
    plain, _ = build_in_child(tmp_path / "cache")
    other, files = build_in_child(tmp_path / "cache", CC="cc -O0")
    assert other != plain
    assert files == SONAMES


@pytest.mark.exhaustive
def test_two_builders_at_once(tmp_path: Path) -> None:
    """Processes that build at the same time agree on one folder and leave no half-built one."""
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: build_in_child(tmp_path / "cache"), range(3)))
    assert {files == SONAMES for _, files in results} == {True}
    assert len({folder for folder, _ in results}) == 1
    assert len(list((tmp_path / "cache" / "tfgpu").iterdir())) == 1


def test_missing_compiler(tmp_path: Path) -> None:
    """Without cc on PATH the error says what to install."""
    text = fail_in_child(tmp_path / "cache", PATH=str(tmp_path))
    assert text.startswith('no C compiler: "cc" is not on PATH')
    assert "apt install gcc" in text


def test_failing_compiler(tmp_path: Path) -> None:
    """The compiler's own words are in the error, and nothing half-built is left."""
    compiler = write_compiler(tmp_path, "echo 'stdio.h: No such file or directory' >&2; exit 3")
    text = fail_in_child(tmp_path / "cache", CC=compiler)
    assert "exit status 3" in text
    assert "stdio.h: No such file or directory" in text
    assert list((tmp_path / "cache" / "tfgpu").iterdir()) == []


def test_no_home(tmp_path: Path) -> None:
    """Without a cache that can be made, a private temporary folder serves, and is gone at exit."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    folder, files = build_in_child(blocked, TMPDIR=str(tmp_path))
    assert files == SONAMES
    assert Path(folder).parent.name.startswith("tfgpu-")
    assert not Path(folder).exists()


@pytest.mark.parametrize("mode", [pytest.param(0o777, marks=pytest.mark.exhaustive), 0o770])
def test_cache_others_can_write(tmp_path: Path, mode: int) -> None:
    """A cache folder that others can write is not trusted: they could plant a library."""
    planted = tmp_path / "cache" / "tfgpu"
    planted.mkdir(parents=True)
    planted.chmod(mode)
    folder, files = build_in_child(tmp_path / "cache", TMPDIR=str(tmp_path))
    assert not folder.startswith(str(planted))
    assert files == SONAMES
    assert list(planted.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_cache_of_somebody_else(tmp_path: Path) -> None:
    """A cache folder that belongs to somebody else is not trusted, whatever lies in it."""
    folder, _ = build_in_child(tmp_path / "cache")
    planted = tmp_path / "cache" / "tfgpu"
    shutil.chown(planted, 12345)
    second, files = build_in_child(tmp_path / "cache", TMPDIR=str(tmp_path))
    assert Path(second).parent != planted
    assert Path(second) != Path(folder)
    assert files == SONAMES


def test_symbolic_link_is_no_cache(tmp_path: Path) -> None:
    """A symbolic link in the place of the cache folder is not followed."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tfgpu").symlink_to(tmp_path / "elsewhere")
    folder, _ = build_in_child(tmp_path / "cache", TMPDIR=str(tmp_path))
    assert Path(folder).parent.name.startswith("tfgpu-")
    assert list((tmp_path / "elsewhere").iterdir()) == []
