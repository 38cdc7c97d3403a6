"""What all tests share: environments for child processes that see simulated GPUs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tfenv.simulate.environment import build_environment, parse_gpus

REPOSITORY = Path(__file__).parent.parent

#: The environments of interpreters are built once for all who use them.
pytest_plugins = ["tests.environments", "tests.selection"]

# A background job of a shell ignores Ctrl-C, and so would every program under test; a handler is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Variables that would change what a child process does; a test sets those it is about.
DISTURBING = (
    "TFGPU_",
    "TF_",
    "CUDA_",
    "SLURM_",
    "RAY_",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "XDG_CONFIG_HOME",
    "XDG_STATE_HOME",
)


@pytest.fixture(scope="session", autouse=True)
def _no_policy_for_all_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail where a test left a policy above the directories of all others: it would count for their programs."""
    yield
    assert not (tmp_path_factory.getbasetemp() / "tfgpu.toml").exists()


class SimulatedGpus(Protocol):
    """Makes the environment of a child process; the arguments are those of `tfgpu simulate`."""

    def __call__(
        self, gpus: str = "4x24GiB", *, log: Path | None = None, processes: Path | None = None, **variables: str
    ) -> dict[str, str]: ...


@pytest.fixture(scope="session")
def simulated_gpus() -> SimulatedGpus:
    """`simulated_gpus("2x24GiB", log=tmp_path / "log", CUDA_VISIBLE_DEVICES="1")` for `subprocess.run(env=...)`.

    A test that starts TensorFlow in it asserts the device count first: without a library it sees no GPU.
    """

    def make(
        gpus: str = "4x24GiB", *, log: Path | None = None, processes: Path | None = None, **variables: str
    ) -> dict[str, str]:
        base = {key: value for key, value in os.environ.items() if not key.startswith(DISTURBING)}
        base |= {"PYTHONPATH": str(REPOSITORY), "TF_CPP_MIN_LOG_LEVEL": "3"}
        return build_environment(parse_gpus(gpus), log=log, processes=processes, base=base) | variables

    return make
