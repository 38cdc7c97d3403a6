"""What `tfgpu verify` measures of one framework, and what it makes of that."""

from __future__ import annotations

from typing import Literal

from tfenv.policy.units import MIB, format_bytes
from tfenv.values import frozen

#: "unproven": something else came first, such as a card that others have filled. "none": there is no promise.
Verdict = Literal["kept", "broken", "unproven", "none"]
#: What refused memory: the framework's own limit, the card that was full, or a limit that the driver keeps.
RefusedBy = Literal["allocator", "card", "wall"]

#: A limit is the allocator's. The CUDA context, cuDNN and cuBLAS come on top of it, and NVML counts them.
MOST_OVERHEAD = 1024 * MIB
_WORST_FIRST: tuple[Verdict, ...] = ("broken", "unproven", "kept", "none")


@frozen
class Promise:
    """A promise of the policy, and what became of it.

    Attributes:
        verdict: Whether it was kept.
        why: What happened, in words. "" if it was kept.
    """

    verdict: Verdict = "none"
    why: str = ""


@frozen
class GpuMeasurement:
    """What a framework got of one GPU. Sizes in bytes. None: not known.

    Attributes:
        label: How people name it: "0", and "0:1" for a MIG instance. None: NVML does not show it.
        uuid: Of the GPU or MIG instance.
        name: Product name.
        limit: What the policy promises that the framework takes at most. None: nothing limits it.
        piece: How much was asked for at once.
        allocated: What the framework gave before it refused, or before the test stopped.
        first: What NVML counted for the process after its first few bytes.
        memory: What NVML counted for the process at last.
        is_process: Whether `first` and `memory` are of this process. False: NVML's processes have other numbers here,
            as in a container, and the sizes are how much more of the card was in use than before.
        card_free: What nobody held of the card at last.
        wall_free: What nobody held at last of the limit that the driver keeps for this cgroup. None: there is none.
        refusal: The framework's words.
        error: An exception that was no refusal.
    """

    label: str | None
    uuid: str
    name: str | None = None
    limit: int | None = None
    piece: int = 0
    allocated: int = 0
    first: int | None = None
    memory: int | None = None
    is_process: bool = True
    card_free: int | None = None
    wall_free: int | None = None
    refusal: str = ""
    error: str = ""

    @property
    def overhead(self) -> int | None:
        """What the process takes beyond its limit, or beyond what it allocated if that is not limited."""
        return None if self.memory is None else max(0, self.memory - (self.limit or self.allocated))

    @property
    def refused_by(self) -> RefusedBy | None:
        """What refused memory. None: nothing did."""
        if not self.refusal:
            return None
        is_within = self.limit is not None and self.allocated + self.piece <= self.limit
        if is_within and self.wall_free is not None and self.wall_free < self.piece:
            return "wall"
        return "card" if self.card_free is not None and self.card_free < self.piece else "allocator"

    def judge_limit(self) -> Promise:
        """Return whether the process stayed within its limit."""
        if self.error:
            return Promise("unproven", f"allocating failed: {self.error}")
        if self.limit is None:
            return Promise("none", "nothing limits it")
        if self.allocated > self.limit:
            return Promise("broken", f"{format_bytes(self.allocated)} were allocated and nothing refused more")
        if self.is_process and self.memory is not None and self.memory > self.limit + MOST_OVERHEAD:
            return Promise("broken", f"NVML counts {format_bytes(self.memory)} for the process")
        if self.refused_by == "card":
            return Promise("unproven", "the card was full before the limit was reached")
        if self.refused_by == "wall":
            text = "all that the driver lets this cgroup have was taken before the limit was reached"
            return Promise("unproven", f"{text}, see `tfgpu gpus`")
        return Promise("kept")

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON, in one level."""
        promise = self.judge_limit()
        return {
            "gpu": self.label,
            "uuid": self.uuid,
            "name": self.name,
            "limit_bytes": self.limit,
            "allocated_bytes": self.allocated,
            "piece_bytes": self.piece,
            "first_nvml_bytes": self.first,
            "nvml_bytes": self.memory,
            "nvml_of": "process" if self.is_process else "card",
            "overhead_bytes": self.overhead,
            "card_free_bytes": self.card_free,
            "wall_free_bytes": self.wall_free,
            "refused_by": self.refused_by,
            "refusal": self.refusal or None,
            "verdict": promise.verdict,
            "why": promise.why or None,
        }


@frozen
class FrameworkMeasurement:
    """What was measured of one framework.

    Attributes:
        name: Its package.
        title: Its name in messages.
        version: None: it could not be imported.
        problem: Why nothing was measured. Its verdict says whether that breaks a promise.
        gpus: The GPUs that it listed, in its order.
        visible: Whether it lists the GPUs that the policy leaves, and no others.
        growth: Whether it takes memory as it needs it.
    """

    name: str
    title: str
    version: str | None = None
    problem: Promise = Promise()
    gpus: tuple[GpuMeasurement, ...] = ()
    visible: Promise = Promise()
    growth: Promise = Promise()

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all promises."""
        return find_worst(self.problem, self.visible, self.growth, *(gpu.judge_limit() for gpu in self.gpus))

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return {
            "framework": self.name,
            "title": self.title,
            "version": self.version,
            "verdict": self.verdict,
            "problem": self.problem.why or None,
            "visible": {"verdict": self.visible.verdict, "why": self.visible.why or None},
            "growth": {"verdict": self.growth.verdict, "why": self.growth.why or None},
            "gpus": [gpu.as_dict() for gpu in self.gpus],
        }


def judge_gpu(made: FrameworkMeasurement, gpu: GpuMeasurement) -> Verdict:
    """Return the verdict on one GPU: on its limit, unless something else is wrong with the framework."""
    limit = gpu.judge_limit()
    others = find_worst(made.visible, made.growth)
    return find_worst(limit, made.visible, made.growth) if others in ("broken", "unproven") else limit.verdict


def find_worst(*promises: Promise) -> Verdict:
    """Return the verdict that counts for all of these promises together."""
    found = {promise.verdict for promise in promises}
    return next(verdict for verdict in _WORST_FIRST if verdict in found)


def judge_growth(gpus: tuple[GpuMeasurement, ...], *, promised: bool) -> Promise:
    """Return whether memory grew while pieces were allocated. Without growth all of it is taken at first."""
    known = [(gpu, gpu.first, gpu.memory) for gpu in gpus if gpu.first is not None and gpu.memory is not None]
    if not promised:
        return Promise()
    if not known:
        return Promise("unproven", "NVML does not tell how much the process holds")
    for gpu, first, memory in known:
        if 2 * (memory - first) < gpu.allocated:
            return Promise("broken", f"{format_bytes(first)} of GPU {gpu.label} were taken at first")
    return Promise("kept")
