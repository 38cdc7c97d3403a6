"""Which cgroups are to have which limits, by the policy of the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from tfenv.devices.cgroups import CGROUP_ROOT, LimitableGpu
from tfenv.errors import Finding, TfenvError
from tfenv.identity import find_subject, identify_login
from tfenv.pipeline import LoadedPolicy, load, select_errors
from tfenv.policy.model import EffectivePolicy, MemoryLimit, Start, Subject
from tfenv.values import field, frozen

_USER_SLICE = re.compile(r"user-(\d{1,10})\.slice", re.ASCII)


class WallError(TfenvError):
    """Limits cannot be set or read. The text says why and what to do."""


@frozen
class Target:
    """A cgroup, and the limits that it is to have.

    Attributes:
        cgroup: Its full path.
        limits: Bytes by UUID of the GPU. None: no limit.
        loaded: The policy that says so. None: the limit was given by hand.
    """

    cgroup: str
    limits: Mapping[str, int | None] = field(default_factory=dict)
    loaded: LoadedPolicy | None = None

    @property
    def user(self) -> str | None:
        """Whose policy it is. None: nobody's."""
        return None if self.loaded is None else self.loaded.subject.user

    @property
    def exists(self) -> bool:
        """Whether there is such a cgroup. Without one the user is not logged in."""
        return os.path.isdir(self.cgroup)


# ---- whose


def find_named_subject(name: str) -> Subject:
    """Return a user by name or number.

    Raises:
        WallError: There is no such user.
    """
    subject = identify_login(int(name)) if name.isdigit() else find_subject(name)
    if subject is None:
        raise WallError(f'there is no user "{name}"; write a login name or a number')
    return subject


def list_logged_in() -> list[Subject]:
    """Return the users who have a slice of systemd's now, by number."""
    try:
        names = os.listdir(f"{CGROUP_ROOT}/user.slice")
    except OSError:
        return []
    uids = sorted(int(match[1]) for name in names if (match := _USER_SLICE.fullmatch(name)))
    return list(map(identify_login, uids))


def resolve_cgroup(path: str) -> str:
    """Return the full path of a cgroup that somebody named.

    Raises:
        WallError: It is none.
    """
    full = os.path.normpath(path if path.startswith("/") else f"{CGROUP_ROOT}/{path}")
    if not full.startswith(f"{CGROUP_ROOT}/"):
        raise WallError(f"{path} is not below {CGROUP_ROOT}, where the driver looks for cgroups")
    if not os.path.isdir(full):
        raise WallError(f"there is no cgroup {full}")
    return full


# ---- how much


def load_machine_policy(subject: Subject) -> LoadedPolicy:
    """Merge the machine's own files for a user. Files of users and projects limit nobody but themselves."""
    return load(Start(cwd=None, uid=os.geteuid(), elevated=True), subject)


def find_mistakes(loaded: LoadedPolicy) -> tuple[Finding, ...]:
    """Return what is wrong with the machine's files, if programs miss some of it.

    Of a file that cannot be read they have the last good copy, so it is none of these.
    """
    return select_errors(loaded.findings)


def make_target(cgroup: str, loaded: LoadedPolicy, gpus: Iterable[LimitableGpu]) -> Target:
    """Return a cgroup with the limits that the policy of a user gives it."""
    return Target(cgroup, {gpu.uuid: compute_limit(loaded.policy, gpu) for gpu in gpus}, loaded)


def compute_limit(policy: EffectivePolicy, gpu: LimitableGpu) -> int | None:
    """Return the bytes of a GPU that all processes of a user may take together. None: as many as there are."""
    if policy.wall == "off":
        return None
    totals = [ceiling.value for ceiling in policy.list_ceilings("memory_total")]
    return _find_smallest([total for total in totals if isinstance(total, MemoryLimit)], gpu)


def give_to_all(limit: MemoryLimit, gpus: Iterable[LimitableGpu]) -> dict[str, int | None]:
    """Return one limit for all GPUs, in bytes of each."""
    return {gpu.uuid: _find_smallest([limit], gpu) for gpu in gpus}


def _find_smallest(limits: Sequence[MemoryLimit], gpu: LimitableGpu) -> int | None:
    size = min((size for limit in limits if (size := limit.on(gpu.total)) is not None), default=None)
    return None if size is None or size >= gpu.total else size
