"""Processes that call the driver by ctypes, for tests of memory limits. Run it with `python -S`: it needs no package.

    python -S cgroup_worker.py UID

It drops to this uid and reads lines of JSON, `[name, verb, argument, ...]`. Each new name is a process of its own, a
child that opens CUDA at its first "open". It prints the answer as a line of JSON. Sizes are in MiB, and -1 is no limit.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterable
from typing import Any, TextIO

MIB = 1 << 20
_NO_LIMIT = (1 << 64) - 1
_ALLOCATE = {
    "cuMemAlloc": "cuMemAlloc_v2",
    "cuMemAllocAsync": "cuMemAllocAsync",
    "cuMemAllocManaged": "cuMemAllocManaged",
}


class _Limits(ctypes.Structure):
    _fields_ = (
        ("path", ctypes.c_char_p), ("soft", ctypes.c_ulonglong), ("hard", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )  # fmt: skip


class _Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


class _Memory2(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint), *((n, ctypes.c_ulonglong) for n in ("total", "reserved", "free", "used")))


class Worker:
    """One process. Each method is a verb."""

    def __init__(self) -> None:
        self._cuda: Any = None
        self._nvml: Any = None
        self._held: list[tuple[str, Any]] = []

    # ---- CUDA

    def open(self, device: int = 0) -> int:
        """Open CUDA, and the context of a device."""
        self._cuda = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        result: int = self._cuda.cuInit(0) or self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        return result or int(self._cuda.cuCtxSetCurrent(context))

    def take(self, kind: str, mib: int) -> int:
        """Allocate in one of the ways that there are."""
        pointer, size = ctypes.c_ulonglong(), ctypes.c_size_t(mib * MIB)
        to = ctypes.byref(pointer)
        if kind == "cuMemCreate":
            result = self._cuda.cuMemCreate(to, size, (ctypes.c_int * 8)(1, 0, 1, 0))
        elif kind == "cuMemAllocFromPoolAsync":
            pool = ctypes.c_void_p()
            self._cuda.cuDeviceGetDefaultMemPool(ctypes.byref(pool), 0)
            result = self._cuda.cuMemAllocFromPoolAsync(to, size, pool, None)
        else:
            result = getattr(self._cuda, _ALLOCATE[kind])(to, size, 1)
        if not result:
            self._held.append((kind, pointer))
        return int(result)

    def free(self, index: int) -> int:
        """Free what was allocated, by its number in the order of what is held."""
        kind, pointer = self._held.pop(index)
        name = {"cuMemCreate": "cuMemRelease", "cuMemAlloc": "cuMemFree_v2", "cuMemAllocManaged": "cuMemFree_v2"}
        return int(getattr(self._cuda, name.get(kind, "cuMemFreeAsync"))(pointer, None))

    def info(self) -> list[int]:
        """Return free and total memory as cuMemGetInfo tells them, and cuDeviceTotalMem's total."""
        free, total, device = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_size_t()
        assert self._cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
        assert self._cuda.cuDeviceTotalMem_v2(ctypes.byref(device), 0) == 0
        return [free.value // MIB, total.value // MIB, device.value // MIB]

    def fork(self) -> int:
        """Fork a child that tries to allocate, and return what the driver answered."""
        child = os.fork()
        if not child:
            os._exit(self._cuda.cuInit(0) or self.take("cuMemAlloc", 2))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    # ---- NVML

    def _handle(self, gpu: int, instance: int | None = None) -> ctypes.c_void_p:
        if self._nvml is None:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            assert self._nvml.nvmlInit_v2() == 0
            self._nvml.nvmlErrorString.restype = ctypes.c_char_p
        handle = ctypes.c_void_p()
        assert self._nvml.nvmlDeviceGetHandleByIndex_v2(gpu, ctypes.byref(handle)) == 0
        if instance is not None:
            found = ctypes.c_void_p()
            assert self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, instance, ctypes.byref(found)) == 0
            return found
        return handle

    def limit(self, path: str | None, soft: int, hard: int, gpu: int = 0, instance: int | None = None) -> int:
        """Set limits, and return what the driver answered."""
        name = None if path is None else path.encode()
        limits = _Limits(name, soft * MIB, _NO_LIMIT if hard < 0 else hard * MIB, 0)
        return int(self._nvml_ask("nvmlDeviceSetMemoryLimits_v1", self._handle(gpu, instance), limits))

    def limits(self, path: str, gpu: int = 0, instance: int | None = None) -> list[int]:
        """Return the driver's answer: 0, the limits, and what is used. Or the error alone."""
        limits = _Limits(path.encode(), 0, 0, 0)
        result = self._nvml_ask("nvmlDeviceGetMemoryLimits_v1", self._handle(gpu, instance), limits)
        hard = -1 if limits.hard == _NO_LIMIT else limits.hard // MIB
        return [result] if result else [0, limits.soft // MIB, hard, limits.used // MIB]

    def memory(self, version: int, gpu: int = 0, instance: int | None = None) -> dict[str, int]:
        """Return NVML's memory info."""
        memory = _Memory() if version == 1 else _Memory2()
        name = "nvmlDeviceGetMemoryInfo" + ("" if version == 1 else "_v2")
        assert self._nvml_ask(name, self._handle(gpu, instance), memory) == 0
        return {name: getattr(memory, name) // MIB for name in ("total", "free", "used")}

    def _nvml_ask(self, function: str, *arguments: Any) -> int:
        *others, last = arguments
        return int(getattr(self._nvml, function)(*others, ctypes.byref(last)))

    def describe(self) -> list[str | int]:
        """Return the driver's release, NVML's version, CUDA's version, and the text of error 13."""
        text, version = ctypes.create_string_buffer(96), ctypes.c_int()
        self._handle(0)
        answers: list[str | int] = []
        for function in ("nvmlSystemGetDriverVersion", "nvmlSystemGetNVMLVersion"):
            assert getattr(self._nvml, function)(text, 96) == 0
            answers.append(text.value.decode())
        assert self._nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) == 0
        return [*answers, version.value, self._nvml.nvmlErrorString(13).decode()]

    # ---- the process

    def move(self, cgroup: str) -> int:
        """Go to another cgroup."""
        with open(f"{cgroup}/cgroup.procs", "w", encoding="ascii") as file:
            return file.write(str(os.getpid())) and 0

    def look(self, path: str) -> list[bool | str | None]:
        """Return whether a file exists, whether it can be read and written, and what it holds."""
        try:
            with open(path, encoding="ascii") as file:
                text: str | None = file.read()
        except OSError:
            text = None
        return [os.path.exists(path), os.access(path, os.R_OK), os.access(path, os.W_OK), text]

    def pid(self) -> int:
        return os.getpid()


def _serve(requests: TextIO, answers: TextIO) -> None:
    worker = Worker()
    for line in requests:
        verb, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, verb)(*arguments)), file=answers, flush=True)


def _fork_worker(others: Iterable[tuple[int, TextIO, TextIO]]) -> tuple[int, TextIO, TextIO]:
    """Start a process. Return its id, where it reads requests, and where it writes answers."""
    (request_end, requests), (answers, answer_end) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        for descriptor in (requests, answers, *(end.fileno() for _, *ends in others for end in ends)):
            os.close(descriptor)  # whoever still had an end would keep another process from its end
        with (
            open(request_end, encoding="ascii") as own_requests,
            open(answer_end, "w", encoding="ascii") as own_answers,
        ):
            _serve(own_requests, own_answers)
        os._exit(0)
    os.close(request_end)
    os.close(answer_end)
    return child, open(requests, "w", encoding="ascii"), open(answers, encoding="ascii")


def main() -> None:
    uid = int(sys.argv[1])
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    workers: dict[str, tuple[int, TextIO, TextIO]] = {}
    for line in sys.stdin:
        name, verb, *arguments = json.loads(line)
        if verb == "environ":
            os.environ.update(arguments[0])
            answer = "0\n"
        elif verb in ("exit", "kill"):
            child, requests, answers = workers.pop(name)
            if verb == "kill":
                os.kill(child, signal.SIGKILL)
            requests.close()
            answer = f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n"
            answers.close()
        else:
            if name not in workers:
                workers[name] = _fork_worker(workers.values())
            _, requests, answers = workers[name]
            print(json.dumps([verb, *arguments]), file=requests, flush=True)
            answer = answers.readline() or "null\n"
        sys.stdout.write(answer)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
