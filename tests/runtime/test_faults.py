"""Faults of the system while tfenv is loaded: the policy is applied, or a line says that it is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import Environment, clean_environment, install, make_environment

#: Fails the TFGPU_TEST_FAULT-th call of its kind, counted from the moment the program says so.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <dirent.h>
static int count;
static int fails(const char *kind) {
    const char *wanted = getenv("FAULT_KIND"), *number = getenv("FAULT_NUMBER");
    if (!wanted || !number || strcmp(wanted, kind) || !getenv("FAULT_ARMED")) return 0;
    if (++count != atoi(number)) return 0;
    errno = strcmp(kind, "open") ? EIO : EMFILE;
    return 1;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
int open64(const char *path, int flags, ...) {
    va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list);
    return fails("open") ? -1 : REAL(open64)(path, flags, mode);
}
int stat64(const char *path, struct stat64 *buffer) { return fails("stat") ? -1 : REAL(stat64)(path, buffer); }
int fstat64(int fd, struct stat64 *buffer) { return fails("fstat") ? -1 : REAL(fstat64)(fd, buffer); }
DIR *opendir(const char *path) { return fails("opendir") ? NULL : REAL(opendir)(path); }
struct dirent64 *readdir64(DIR *folder) { return fails("readdir") ? NULL : REAL(readdir64)(folder); }
void *mmap64(void *at, size_t size, int prot, int flags, int fd, off64_t offset) {
    return fails("mmap") ? MAP_FAILED : REAL(mmap64)(at, size, prot, flags, fd, offset);
}
"""

#: Runs the program once for each number, in a child that was forked before tfenv was loaded.
PROGRAM = """
import os, sys
kind = sys.argv[1]
for number in range(*map(int, sys.argv[2:])):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        os.environ.update(FAULT_KIND=kind, FAULT_NUMBER=str(number), FAULT_ARMED="1")
        try:
            import tensorflow
        except BaseException as error:
            result = repr(error)
        else:
            result = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ.pop("FAULT_ARMED")
        os.write(1, f"{number} {result}\\n".encode())
        os._exit(0)
    os.close(write)
    if os.waitpid(child, 0)[1]:
        print(number, "died of a fault in Python itself", flush=True)
    said = os.read(read, 65536).decode()
    os.close(read)
    print(number, "said", len(said.splitlines()), said.splitlines()[:1], flush=True)
"""


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel, its dependencies' folder, a stand-in for TensorFlow, and a policy beside the program."""
    made = make_environment(sys.executable, tmp_path_factory.mktemp("faults") / "venv")
    install(made, wheel)
    dependencies = next(entry for entry in sys.path if entry.endswith("site-packages"))
    (made.site_packages / "zz_dependencies.pth").write_text(f"{dependencies}\n")
    (made.site_packages / "tensorflow").mkdir()
    (made.site_packages / "tensorflow" / "__init__.py").write_text("")
    (made.folder / "tfgpu.toml").write_text('[gpu]\nvisible_devices = "none"\n[audit]\nfile = "audit.jsonl"\n')
    (made.folder / "program.py").write_text(PROGRAM)
    (made.folder / "shim.c").write_text(SHIM)
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    command = [compiler, "-shared", "-fPIC", "-w", "-o", "shim.so", "shim.c", "-ldl"]
    subprocess.run(command, cwd=made.folder, check=True)
    made.run("-c", "import tensorflow")  # writes bytecode
    return made


@pytest.mark.parametrize("kind", ["open", "stat", "fstat", "opendir", "readdir", "mmap"])
def test_no_single_fault_loses_the_policy_in_silence(environment: Environment, kind: str, exhaustive: bool) -> None:
    """Whichever call of the system fails while TensorFlow is imported, the policy holds or one line is said."""
    numbers = range(1, 150, 1 if exhaustive else 6)
    done = subprocess.run(
        [environment.python, "program.py", kind, *map(str, (numbers.start, numbers.stop, numbers.step))],
        cwd=environment.folder,
        env={**clean_environment(), "LD_PRELOAD": str(environment.folder / "shim.so"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    results = dict(line.split(" ", 1) for line in lines if " said " not in line)
    said = {line.split()[0]: line.split()[2] for line in lines if " said " in line}
    assert len(results) == len(said) == len(numbers), done.stderr + done.stdout[-500:]
    loud = ("-1", "died", "OSError", "ModuleNotFoundError", "MemoryError", "ImportError")  # Python's own, as without us
    silent = [number for number, result in results.items() if not result.startswith(loud) and said[number] == "0"]
    assert silent == [], [line for line in lines if line.split()[0] in silent]
