"""What `tfgpu verify` makes of measured sizes, and how it speaks with its child."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tfenv.cli.diagnosis.interpreter import NoAnswerError
from tfenv.cli.verification.child import ChildProgram
from tfenv.cli.verification.measurement import (
    MOST_OVERHEAD,
    FrameworkMeasurement,
    GpuMeasurement,
    Promise,
    judge_gpu,
    judge_growth,
)

GIB = 1 << 30
MIB = 1 << 20
KEPT = {"limit": 8 * GIB, "piece": 128 * MIB, "allocated": 8 * GIB - 64 * MIB, "memory": 8 * GIB + 520 * MIB}


def make_gpu(**changes: Any) -> GpuMeasurement:
    """Return what was measured of a GPU on which the limit held, but for the changes."""
    fields = {**KEPT, "first": 522 * MIB, "card_free": 71 * GIB, "refusal": "OutOfMemoryError: …", **changes}
    return GpuMeasurement("0", "GPU-8932f937", **fields)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "kept"),
        ({"allocated": 8 * GIB + 1, "refusal": ""}, "broken"),
        ({"memory": 8 * GIB + MOST_OVERHEAD + 1}, "broken"),
        ({"memory": 8 * GIB + MOST_OVERHEAD + 1, "is_process": False}, "kept"),
        ({"memory": None}, "kept"),
        ({"allocated": 3 * GIB, "card_free": 127 * MIB}, "unproven"),
        ({"allocated": 3 * GIB, "card_free": None}, "kept"),
        ({"allocated": 3 * GIB, "wall_free": 127 * MIB}, "unproven"),
        ({"allocated": 3 * GIB, "wall_free": 128 * MIB}, "kept"),
        ({"wall_free": 16 * MIB}, "kept"),
        ({"refusal": "", "error": "RuntimeError: no kernel"}, "unproven"),
        ({"limit": None, "allocated": 64 * MIB, "refusal": ""}, "none"),
    ],
)
def test_what_becomes_of_a_limit(changes: dict[str, Any], verdict: str) -> None:
    """A limit is kept if the framework's allocator refused within it, and NVML counts not much more."""
    assert make_gpu(**changes).judge_limit().verdict == verdict


def test_who_refused() -> None:
    """It was the wall if the limit had room for a piece and the cgroup had not. A limit just below it was reached."""
    assert make_gpu(allocated=3 * GIB, wall_free=127 * MIB).refused_by == "wall"
    assert make_gpu(wall_free=16 * MIB).refused_by == "allocator"
    assert make_gpu(allocated=3 * GIB, wall_free=GIB, card_free=127 * MIB).refused_by == "card"


def test_what_a_process_takes_beyond() -> None:
    """What is beyond the limit is what NVML counts more. Without a limit it is what was not allocated."""
    assert make_gpu().overhead == 520 * MIB
    assert make_gpu(limit=None, allocated=64 * MIB, memory=586 * MIB).overhead == 522 * MIB
    assert make_gpu(memory=None).overhead is None


@pytest.mark.parametrize(
    ("first", "memory", "promised", "verdict"),
    [
        (522 * MIB, 8 * GIB, True, "kept"),
        (8 * GIB, 8 * GIB, True, "broken"),
        (8 * GIB, 8 * GIB, False, "none"),
        (None, 8 * GIB, True, "unproven"),
    ],
)
def test_what_becomes_of_growth(first: int | None, memory: int, *, promised: bool, verdict: str) -> None:
    """Memory grows if the process holds much more in the end than after its first bytes."""
    assert judge_growth((make_gpu(first=first, memory=memory),), promised=promised).verdict == verdict


def test_one_broken_promise_is_the_verdict() -> None:
    """A limit that held is no proof where the framework broke something else."""
    made = FrameworkMeasurement("jax", "JAX", "0.10.2", gpus=(make_gpu(),), visible=Promise("kept"))
    assert (made.verdict, judge_gpu(made, made.gpus[0])) == ("kept", "kept")
    made = FrameworkMeasurement("jax", "JAX", "0.10.2", gpus=(make_gpu(),), growth=Promise("broken", "at first"))
    assert (made.verdict, judge_gpu(made, made.gpus[0])) == ("broken", "broken")
    made = FrameworkMeasurement("jax", "JAX", "0.10.2", gpus=(make_gpu(limit=None),), visible=Promise("kept"))
    assert judge_gpu(made, made.gpus[0]) == "none"


# ---- the child


def start(code: str) -> ChildProgram:
    return ChildProgram([sys.executable, "-c", code], {}, 60)


def test_answers_and_orders_alternate(capfd: pytest.CaptureFixture[str]) -> None:
    """A line of JSON each. What tfenv says in the child is passed on, and nothing else."""
    code = (
        "import json, sys; print('tfgpu: waits\\nnoise', file=sys.stderr, flush=True); print('{}', flush=True);"
        "print(json.dumps({'double': 2 * json.loads(input())['number']}), flush=True)"
    )
    with start(code) as child:
        assert child.read() == {}
        child.send({"number": 21})
        assert child.read() == {"double": 42}
    assert capfd.readouterr().err == "tfgpu: waits\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('half installed')", "RuntimeError: half installed"),
        ("raise SystemExit(7)", "it ended with status 7"),
        ("import os; os.kill(os.getpid(), 9)", "it was ended by SIGKILL"),
    ],
)
def test_a_child_that_ends_says_why(code: str, words: str) -> None:
    """Its last words are the reason, or else how it ended."""
    with pytest.raises(NoAnswerError) as caught, start(code) as child:
        child.read()
    assert str(caught.value) == words
