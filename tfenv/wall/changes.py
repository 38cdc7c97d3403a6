"""Bringing limits of cgroups to what is wanted: what is to change, and doing it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tfenv.devices import nvml
from tfenv.devices.cgroups import (
    CGROUP_ROOT,
    CgroupLimits,
    LimitableGpu,
    LimitableGpus,
    LimitSupport,
    find_uncounted,
    list_chain,
    list_limitable,
    read_own_limits,
    read_support,
    set_limits,
)
from tfenv.values import frozen, replace
from tfenv.wall.targets import Target, WallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

_NO_LIMITS = CgroupLimits()


@frozen
class LimitChange:
    """What changes for one GPU.

    Attributes:
        gpu: The GPU.
        before: What is set now.
        after: Bytes to set. None: no limit.
    """

    gpu: LimitableGpu
    before: CgroupLimits
    after: int | None


@frozen
class CgroupChange:
    """What changes for one cgroup.

    Attributes:
        target: The cgroup, and what it is to have.
        limits: Its limits that change. (): none does.
        enable: The cgroups in which the kernel's controller has to be switched on before, from the root down.
    """

    target: Target
    limits: tuple[LimitChange, ...] = ()
    enable: tuple[str, ...] = ()


class WallSetter:
    """The limits for cgroups of this machine, through NVML. Use it through `open_wall`.

    Attributes:
        support: Who keeps them.
        machine: The GPUs on which they can be set, and the others.
    """

    def __init__(self, pynvml: ModuleType) -> None:
        """
        Args:
            pynvml: NVML, open.
        """
        self._pynvml = pynvml
        self.support: LimitSupport = read_support(pynvml)
        self.machine: LimitableGpus = list_limitable(pynvml)

    def require(self) -> None:
        """Raise WallError where nobody keeps limits."""
        if self.support.backend == "none":
            raise WallError(self.support.problem)

    def read(self, cgroup: str, gpu: LimitableGpu) -> CgroupLimits | None:
        """Return the limits that are set on a cgroup itself. None: none are."""
        return read_own_limits(self._pynvml, gpu.handle, cgroup, self.support.backend)

    # -- what is to change

    def compare(self, target: Target) -> CgroupChange:
        """Return what has to change for a cgroup that exists.

        Raises:
            WallError: It cannot have limits.
        """
        changes = []
        for gpu in self.machine.gpus:
            before, after = self.read(target.cgroup, gpu) or _NO_LIMITS, target.limits.get(gpu.uuid)
            if before.hard != after or before.soft:
                changes.append(LimitChange(gpu, before, after))
        sets = any(change.after is not None for change in changes)
        enable = self._find_disabled(target.cgroup) if sets and self.support.backend == "dmem" else ()
        return CgroupChange(target, tuple(changes), enable)

    def _find_disabled(self, cgroup: str) -> tuple[str, ...]:
        """Return the cgroups whose children lack the kernel's files, from the root down to the cgroup's parent."""
        uncounted = find_uncounted(cgroup)
        if uncounted is None:
            return ()
        if "dmem" not in _read_words(f"{CGROUP_ROOT}/cgroup.controllers"):
            raise WallError(f"the kernel's controller dmem cannot be switched on for {uncounted}")
        chain = list(reversed(list(list_chain(os.path.dirname(cgroup)))))
        return tuple(chain[chain.index(os.path.dirname(uncounted)) :])

    # -- changing it

    def apply(self, change: CgroupChange) -> tuple[CgroupChange, list[str]]:
        """Set the limits of a cgroup, as far as the kernel and the driver let it.

        A soft limit is set to 0 first: the cgroups above would keep it reserved.

        Returns:
            What was changed, and why the rest was not.
        """
        try:
            for cgroup in change.enable:
                _enable_controller(cgroup)
        except WallError as error:
            return replace(change, limits=()), [str(error)]
        done, problems = [], []
        for limit in change.limits:
            try:
                if limit.before.soft:
                    self._set(change.target.cgroup, limit.gpu, CgroupLimits(hard=limit.before.hard))
                self._set(change.target.cgroup, limit.gpu, CgroupLimits(hard=limit.after))
            except self._pynvml.NVMLError as error:
                where = f"{change.target.cgroup} on GPU {limit.gpu.index}"
                problems.append(f"the driver refuses a limit for {where}: {_explain(error)}")
            else:
                done.append(limit)
        return replace(change, limits=tuple(done)), problems

    def _set(self, cgroup: str, gpu: LimitableGpu, limits: CgroupLimits) -> None:
        set_limits(self._pynvml, gpu.handle, cgroup, limits)


@contextmanager
def open_wall() -> Iterator[WallSetter]:
    """Yield the limits of this machine.

    Raises:
        WallError: NVML cannot be asked.
    """
    try:
        with nvml.open_nvml() as pynvml:
            yield WallSetter(pynvml)
    except nvml.NvmlUnavailableError as error:
        raise WallError(str(error)) from error


def _explain(error: Exception) -> str:
    if type(error).__name__ == "NVMLError_NoPermission":
        return "only root may set limits; run the command with sudo"
    return nvml.explain_error(error)


def _read_words(path: str) -> Sequence[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return ()


def _enable_controller(cgroup: str) -> None:
    try:
        with open(f"{cgroup}/cgroup.subtree_control", "w", encoding="ascii") as file:
            file.write("+dmem")
    except OSError as error:
        text = f"the kernel's controller dmem cannot be switched on in {cgroup}: {error.strerror}"
        raise WallError(text) from error
