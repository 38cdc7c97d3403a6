"""What tfenv asks each launcher: which GPUs it gave, which share of each, which rank, which job."""

from __future__ import annotations

from tfenv.values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tfenv.policy.model import Share

    _Environment = Mapping[str, str]


@frozen
class Launcher:
    """One launcher. Each question is a function of the environment.

    A launcher that writes no variable asks modules that the process has loaded. It imports none of them.

    Attributes:
        name: As people write it: "Slurm".
        is_scheduler: It hands out GPUs to jobs, so that a job without any has none under `require_grant`.
        is_ours: Tells whether the process is one of the launcher's. None: what the registry saw is enough.
        assigns_late: Tells whether it writes CUDA_VISIBLE_DEVICES in this process while that runs. None: it does not.
        read_assignment: Tells the CUDA_VISIBLE_DEVICES that it assigned by now to what runs in this process. None, also
            as the answer: it does not say.
        read_job: Describes the job, by the names of `policy.model.Grant.job`. None: there is nothing to tell.
        read_devices: Lists the GPUs that it gave. () is none. None, also as the answer: it does not say.
        lists_devices: It always lists the GPUs that it gives: what `read_devices` does not list was not given.
        mounts_devices: Tells whether it gives GPUs by mounting their devices, so that what is there was given. None: it
            does not.
        read_share: Tells the share of each GPU. None, also as the answer: it does not say.
        read_rank: Tells the local rank. None, also as the answer: it does not say.
        has_own_gpus: Tells whether it gave each rank GPUs of its own. None: it does not.
    """

    name: str
    is_scheduler: bool = True
    is_ours: Callable[[_Environment], bool] | None = None
    assigns_late: Callable[[], bool] | None = None
    read_assignment: Callable[[], str | None] | None = None
    read_job: Callable[[_Environment], dict[str, str]] | None = None
    read_devices: Callable[[_Environment], tuple[str, ...] | None] | None = None
    lists_devices: bool = False
    mounts_devices: Callable[[_Environment], bool] | None = None
    read_share: Callable[[_Environment], Share | None] | None = None
    read_rank: Callable[[_Environment], int | None] | None = None
    has_own_gpus: Callable[[_Environment], bool] | None = None


#: Characters of a number in a variable. Python refuses to convert very long ones.
_LONGEST_NUMBER = 16


def read_number(text: str | None, default: float = 0.0) -> float:
    """Read a number such as "3" or "37.5" that a launcher wrote. `default`, if it is none."""
    if text is None or len(text) > _LONGEST_NUMBER or not text.isascii():
        return default
    whole, _, decimals = text.partition(".")
    return float(text) if whole.isdigit() and (decimals.isdigit() or whole == text) else default


def pick(environ: _Environment, names: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are set and not empty, under other names.

    Args:
        environ: The environment.
        names: For each new name the variable.
    """
    return {name: environ[variable] for name, variable in names.items() if environ.get(variable)}


def describe_by(scheduler: str, names: Mapping[str, str]) -> Callable[[_Environment], dict[str, str]]:
    """Make the `read_job` of a scheduler that names its jobs in variables. `names` are those of `pick`."""
    return lambda environ: {"scheduler": scheduler, **pick(environ, names)}
