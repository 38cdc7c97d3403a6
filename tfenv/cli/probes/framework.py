"""What `tfgpu doctor` and `tfgpu verify` ask of any framework, from inside of an interpreter.

The interpreter may be any, with or without tfenv. So it gets this file as text, followed by that of one framework, and
neither imports anything of tfenv.

    python -c TEXT describe [keras]    prints what the framework sees, as one line of JSON
    python -c TEXT fill [modest]       takes memory, and agrees on each step with the parent: see `fill`
"""

import ctypes
import json
import os
import signal
import sys
import threading
from importlib import import_module
from typing import Any, ClassVar

_PR_SET_PDEATHSIG = 1
_FIRST_BYTES = 4
_MOST_TEXT = 200


class Probe:
    """What a framework's file tells of it. Everything is imported inside of the methods.

    Attributes:
        name: Its top-level package.
        growing: Variables with which a program asks for memory as it needs it.
        listing: Variables under which the framework takes no memory to list GPUs.
    """

    name = ""
    growing: ClassVar[dict[str, str]] = {}
    listing: ClassVar[dict[str, str]] = {}

    def describe(self) -> "dict[str, Any]":
        """Return what doctor shows: "version", "gpus", "problem", "install", and more."""
        raise NotImplementedError

    def list_ordinals(self) -> "list[int]":
        """Return the GPUs that the framework lists, as CUDA counts, in the framework's order."""
        raise NotImplementedError

    def allocate(self, place: int, size: int) -> object:
        """Take memory of a device that the framework lists at this place, and return what holds it."""
        raise NotImplementedError

    def is_refusal(self, error: Exception) -> bool:
        """Return whether an exception is the framework's own way to say that there is no memory left."""
        raise NotImplementedError

    def find_cuda_version(self) -> "str | None":
        """Return the CUDA that it is built for. None: it is not. "" if it does not tell which."""
        raise NotImplementedError


def run_probe(probe: Probe) -> None:
    """Do what the command line says."""
    action, *options = sys.argv[1:]
    # Frameworks print to stdout, too.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if action == "describe":
        os.environ.update(probe.listing)
        seen, release = probe.describe(), probe.find_cuda_version()
        seen |= {"cuda": release is not None, "cuda_version": release}
        _answer(answers, seen | (describe_keras() if "keras" in options else {}))
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it must not outlive a parent that is killed
    if "modest" in options:
        os.environ.update(probe.growing)
    fill(probe, answers)


def _answer(stream: Any, value: "dict[str, Any]") -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


def _read_order() -> "dict[str, Any]":
    line = sys.stdin.readline()
    if not line:
        sys.exit("the parent is gone")
    order: dict[str, Any] = json.loads(line)
    return order


# ---- describing


def describe_keras() -> "dict[str, Any]":
    """Return the version of Keras, or why it cannot be imported."""
    try:
        keras: Any = import_module("keras")
    except Exception as error:  # noqa: BLE001 - a broken Keras is a finding
        return {"keras": None, "keras_error": f"{type(error).__name__}: {error}"}
    return {"keras": keras.__version__}


def is_policy_error(error: Exception) -> bool:
    """Return whether tfenv refused the framework: `on_error = "fail"`. That is no GPU that is missing."""
    return type(error).__name__ == "PolicyError"  # there may be no tfenv to import the class from


def find_missing_libraries(names: "tuple[str, ...]") -> "list[str]":
    """Return the libraries that cannot be loaded. Those of pip's packages can: the framework has just loaded them."""
    missing = []
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return missing


def describe_cuda_devices() -> "list[tuple[str, int]]":
    """Return the UUID, as hex digits, and the memory of each GPU that CUDA shows. [] if CUDA is not open."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, found = ctypes.c_int(), []
    if cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    # The second version tells the slices of one card apart (MIG).
    get_uuid = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
    for ordinal in range(count.value):
        device, uuid, total = ctypes.c_int(), (ctypes.c_ubyte * 16)(), ctypes.c_size_t()
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        get_uuid(uuid, device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        found.append((bytes(uuid).hex(), total.value))
    return found


# ---- filling


def fill(probe: Probe, answers: Any) -> None:
    """Take memory of each GPU in three steps. The parent measures after each, and then says how to go on.

    1. List the GPUs. The parent answers into how many "parts" the framework splits each.
    2. Take a few bytes of each. The parent answers for each with a "piece" and with where to "stop", in bytes.
    3. Take pieces of each until one is refused, or until they are more than "stop". All GPUs at once: some frameworks
       wait ten seconds before they refuse.
    """
    version = str(getattr(import_module(probe.name), "__version__", "") or "")
    ordinals, shown = probe.list_ordinals(), describe_cuda_devices()
    gpus = [{"uuid": shown[number][0], "total": shown[number][1]} for number in ordinals if number < len(shown)]
    _answer(answers, {"version": version, "cuda": probe.find_cuda_version() is not None, "gpus": gpus})
    parts: list[int] = _read_order()["parts"]
    places = [sum(parts[:number]) for number in range(len(parts))]
    held: list[object] = [probe.allocate(place, _FIRST_BYTES) for place in places]
    _answer(answers, {})
    orders = _read_order()["gpus"]
    results: list[dict[str, Any]] = [{} for _ in orders]

    def work(number: int) -> None:
        devices = range(places[number], places[number] + parts[number])
        results[number] = _fill_gpu(probe, devices, orders[number], held)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _answer(answers, {"gpus": results})
    sys.stdin.read()  # the parent closes it when it has measured


def _fill_gpu(probe: Probe, devices: range, order: "dict[str, int]", held: "list[object]") -> "dict[str, Any]":
    """Return how many bytes were allocated of a GPU, and why not more: "refused" by the framework, or an "error"."""
    allocated, refused, problem = 0, "", ""
    for place in devices:
        try:
            while allocated <= order["stop"]:
                held.append(probe.allocate(place, order["piece"]))
                allocated += order["piece"]
        except Exception as error:  # noqa: BLE001 - the parent judges it
            text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:_MOST_TEXT]}"
            refused, problem = (text, problem) if probe.is_refusal(error) else (refused, text)
    return {"allocated": allocated, "refused": refused, "error": problem}
