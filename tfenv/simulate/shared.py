"""Makes and opens the folder of a simulated machine that several users share.

    machine.json            the GPUs
    lib/                    the stub libraries
    processes               memory that other programs hold, as in `--processes`
    requests.jsonl          the requests of everybody (0666)
    requests.jsonl.leases/  the leases of everybody (1777)

Only the owner can change the other files: the programs of everybody load the libraries.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tfenv.errors import TfenvError
from tfenv.identity import get_user_name
from tfenv.simulate.build import build_libraries
from tfenv.simulate.environment import SimulatedGpu, build_environment
from tfenv.values import as_dict, frozen

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


class SharedMachineError(TfenvError):
    """A folder cannot be used as a shared machine. The text says why and what to do."""


@frozen
class SharedMachine:
    """A simulated machine that several users share.

    Attributes:
        folder: Where its files are. Its owner is root or the caller.
        gpus: Its GPUs, in the order of their PCI buses.
    """

    folder: Path
    gpus: tuple[SimulatedGpu, ...]

    @property
    def log(self) -> Path:
        """The file with the requests of everybody."""
        return self.folder / "requests.jsonl"

    def build_environment(self, processes: Path | None = None) -> dict[str, str]:
        """Return the whole environment for a child process on this machine.

        Args:
            processes: Replaces the machine's own list of memory that other programs hold.
        """
        listed = processes or self.folder / "processes"
        return build_environment(self.gpus, log=self.log, processes=listed, libraries=self.folder / "lib")


def open_machine(path: Path) -> SharedMachine:
    """Read a shared machine that exists.

    Raises:
        SharedMachineError: There is none, or somebody else could change its libraries.
    """
    folder = _resolve_folder(path)
    if not os.path.lexists(folder):
        text = f"there is no shared machine in {folder}; make one with --gpus, as root"
        raise SharedMachineError(f"{text}: sudo tfgpu simulate --shared {folder} --gpus 4x24GiB -- tfgpu gpus")
    _require_trusted(folder)
    try:
        described = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
        gpus = tuple(SimulatedGpu(**{**gpu, "instances": tuple(gpu["instances"])}) for gpu in described)
    except FileNotFoundError as error:
        raise SharedMachineError(f"{folder} is not a shared machine; name a folder that does not exist") from error
    except OSError as error:
        raise SharedMachineError(f"cannot read {error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        text = f"this version of tfgpu cannot read {folder}/machine.json; remove {folder} and make it again"
        raise SharedMachineError(text) from error
    return SharedMachine(folder, gpus)


def create_machine(path: Path, gpus: Sequence[SimulatedGpu]) -> None:
    """Make a shared machine. Its folder appears complete, or not at all.

    Raises:
        SharedMachineError: The folder exists, or cannot be made.
        SimulationError: The stub libraries could not be built.
    """
    folder = _resolve_folder(path)
    if os.path.lexists(folder):
        open_machine(path)  # says what else it is
        text = f"{folder} has its GPUs already; leave out --gpus, --reserved, --context and --cgroup-limits"
        raise SharedMachineError(f"{text}, or remove the folder to make another machine")
    _require_trusted(folder.parent, may_be_sticky=True)
    libraries = build_libraries()
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        text = f"cannot write in {folder.parent}: {error.strerror}; run the command as root, with sudo"
        raise SharedMachineError(text) from error
    try:
        _fill_folder(draft, gpus, libraries)
        draft.rename(folder)
    except OSError as error:
        raise SharedMachineError(f"cannot make {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill_folder(folder: Path, gpus: Sequence[SimulatedGpu], libraries: Path) -> None:
    (folder / "machine.json").write_text(json.dumps([as_dict(gpu) for gpu in gpus], indent=1), encoding="utf-8")
    (folder / "processes").touch()
    (folder / "requests.jsonl").touch()
    (folder / "requests.jsonl.leases").mkdir()
    shutil.copytree(libraries, folder / "lib")
    # The umask of root may be 077.
    for entry in (folder, *folder.rglob("*")):
        entry.chmod(0o755 if entry.is_dir() else 0o644)
    (folder / "requests.jsonl").chmod(0o666)
    (folder / "requests.jsonl.leases").chmod(0o1777)


# ---- who could change it


def _resolve_folder(path: Path) -> Path:
    """Return the real path of a folder. A link in its own place is kept, to be refused."""
    absolute = Path(os.path.abspath(path))
    return absolute.parent.resolve() / absolute.name


def _require_trusted(folder: Path, *, may_be_sticky: bool = False) -> None:
    """Raise SharedMachineError unless the folder is out of reach of all but root and the caller."""
    for place in (folder, *folder.parents):
        try:
            status = place.lstat()
        except OSError as error:
            raise SharedMachineError(f"{place}: {error.strerror}") from error
        if not stat.S_ISDIR(status.st_mode):
            raise SharedMachineError(f"{place} is not a directory")
        if status.st_uid not in (0, os.geteuid()):
            text = f"{place} belongs to {get_user_name(status.st_uid)}, who could run code as you"
            raise SharedMachineError(f"{text}; use a folder of root's in a place such as /srv")
        is_sticky = status.st_mode & stat.S_ISVTX and (may_be_sticky or place != folder)
        if status.st_mode & _WRITABLE and not is_sticky:
            raise SharedMachineError(f"others can write in {place}; run: chmod go-w {place}")
