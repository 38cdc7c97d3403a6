"""What programs do with PyTorch, for `zygote`. Each way takes what memory it can get, and returns what it saw.

Results are the same with and without a policy. How much memory a way took, the simulated driver tells.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # type: ignore[import-not-found,unused-ignore]

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 100 << 20
#: Blocks that a way asks for: more than the policies of the tests allow, less than a card has.
COUNT = 30


def fill(device: str = "cuda", take: Callable[[], object] | None = None) -> None:
    """Take blocks of a GPU until it refuses."""
    one = take or (lambda: torch.empty(BLOCK, dtype=torch.uint8, device=device))
    kept = []
    try:
        for _ in range(COUNT):
            kept.append(one())  # noqa: PERF401 - the blocks so far stay
    except RuntimeError as error:  # TorchScript wraps the error of its own class
        if "out of memory" not in str(error):
            raise


def fill_both() -> None:
    """Take blocks of two GPUs."""
    fill("cuda:0")
    fill("cuda:1")


# ---- plain use


def count() -> list[Any]:
    """Count GPUs without opening CUDA, and with it."""
    return [torch.cuda.device_count(), torch.cuda.is_available(), torch.cuda.device_count()]


def available() -> bool:
    """Ask whether there is a GPU, which opens CUDA."""
    return bool(torch.cuda.is_available())


def are_counted() -> bool:
    """Count GPUs as NVML shows them, and return whether there are any."""
    return bool(torch.cuda.device_count())


def device_count() -> int:
    """Count GPUs as NVML shows them."""
    return int(torch.cuda.device_count())


def initialise() -> None:
    """Initialise torch.cuda."""
    torch.cuda.init()


def train() -> list[str]:
    """Train a step on a GPU, then take memory."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = model(torch.ones(16, 8, device="cuda")).pow(2).mean()
    loss.backward()
    optimizer.step()
    fill()
    return [str(loss.device), str(loss.dtype)]


class Numbers(torch.utils.data.Dataset):  # type: ignore[misc]
    """A few numbers."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index))


def load(first: str = "") -> list[float]:
    """Load data with forked workers, and take memory for each batch. "init": torch.cuda is initialised before."""
    if first == "init":
        torch.cuda.init()
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    sums = [float(batch.sum()) for batch in loader]
    fill()
    return sums


# ---- settings


def fraction(value: str) -> None:
    """Set the program's own fraction."""
    torch.cuda.set_per_process_memory_fraction(float(value), 0)


def read_fraction() -> float:
    """Return the fraction that PyTorch says it keeps."""
    return float(torch.cuda.get_per_process_memory_fraction(0))


def settings(text: str) -> None:
    """Change the allocator's settings in code."""
    torch._C._accelerator_setAllocatorSettings(text)


def old_settings(text: str) -> None:
    """Change the allocator's settings by their old name."""
    torch.cuda.memory._set_allocator_settings(text)


def variable(text: str) -> None:
    """Set an environment variable after PyTorch was imported."""
    name, _, value = text.partition("=")
    os.environ[name] = value


def no_caching() -> None:
    """Switch the caching allocator off."""
    torch.cuda.memory.caching_allocator_enable(False)


def backend() -> str:
    """Return the name of the allocator's backend."""
    return str(torch.cuda.memory.get_allocator_backend())


# ---- other ways to memory


def raw_alloc() -> None:
    """Take memory by the allocator's own call."""
    fill(take=lambda: torch.cuda.caching_allocator_alloc(BLOCK, 0))


def pool() -> None:
    """Take memory in a pool."""
    own = torch.cuda.MemPool()

    def take() -> torch.Tensor:
        with torch.cuda.use_mem_pool(own):
            return torch.empty(BLOCK, dtype=torch.uint8, device="cuda")

    fill(take=take)


def graph() -> None:
    """Take memory while a graph is captured."""
    own = torch.cuda.CUDAGraph()
    with contextlib.suppress(torch.OutOfMemoryError), torch.cuda.graph(own, stream=torch.cuda.Stream()):
        kept = [torch.empty(BLOCK, dtype=torch.uint8, device="cuda") for _ in range(COUNT)]
        kept.clear()


def script() -> bool:
    """Take memory by TorchScript alone. It opens CUDA in C++. Return whether torch.cuda knows of it."""

    @torch.jit.script  # type: ignore[untyped-decorator]
    def make(count: int) -> torch.Tensor:
        return torch.empty([count], dtype=torch.uint8, device=torch.device("cuda"))

    fill(take=lambda: make(BLOCK))
    return bool(torch.cuda.is_initialized())


def generator() -> str:
    """Open CUDA by a generator, which is C++."""
    return str(torch.Generator(device="cuda").device)


def stream() -> bool:
    """Open CUDA by a stream, which is C++."""
    return isinstance(torch.cuda.Stream(), torch.cuda.Stream)


def pinned() -> bool:
    """Open CUDA by pinned memory of the host."""
    return bool(torch.ones(10).pin_memory().is_pinned())


def saved() -> str:
    """Load a saved tensor to a GPU."""
    file = io.BytesIO()
    torch.save(torch.ones(10), file)
    file.seek(0)
    return str(torch.load(file, map_location="cuda").device)


_SOURCE = """
#include <stddef.h>
int cudaMalloc(void **, size_t);
int cudaFree(void *);
void *take(size_t size, int device, void *stream) { void *block = 0; cudaMalloc(&block, size); return block; }
void give_back(void *block, size_t size, int device, void *stream) { cudaFree(block); }
"""


def _make_allocator() -> Any:
    """Compile an allocator that keeps no limit."""
    library = Path.cwd() / f"allocator-{os.getpid()}.so"
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=_SOURCE, text=True, check=True)
    return torch.cuda.memory.CUDAPluggableAllocator(str(library), "take", "give_back")


def pluggable() -> None:
    """Take memory with an allocator of the program's own."""
    torch.cuda.memory.change_current_allocator(_make_allocator())
    fill()


def pluggable_pool() -> None:
    """Take memory in a pool that has an allocator of the program's own."""
    own = torch.cuda.MemPool(_make_allocator().allocator())

    def take() -> torch.Tensor:
        with torch.cuda.use_mem_pool(own):
            return torch.empty(BLOCK, dtype=torch.uint8, device="cuda")

    fill(take=take)


# ---- processes and threads


def spawn() -> int | None:
    """Take memory in a process that is started anew."""
    child = multiprocessing.get_context("spawn").Process(target=fill)
    child.start()
    child.join()
    return child.exitcode


def fork(way: str = "fill") -> int:
    """Go another way in a forked child. Return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            globals()[way]()
            status = 0
        except RuntimeError as error:
            print(error, flush=True)
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def race() -> int:
    """Take memory in threads that all begin at once. Return how many went through."""
    begin = threading.Barrier(8)
    passed: list[bool] = []

    def run() -> None:
        begin.wait()
        torch.zeros(1, device="cuda")
        passed.append(torch.cuda.is_initialized())

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fill()
    return sum(passed)
