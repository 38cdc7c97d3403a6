"""What Ray's modules tell of a worker, in whatever state they are. With real Ray: tests/engines/test_ray.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.launchers.small_ray import Context, Worker, load
from tfenv.launchers.ray import LAUNCHER

BEFORE = {"RAY_JOB_ID": "ffffffff"}


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the modules away afterwards."""
    before = {name: sys.modules.get(name) for name in ("ray._private.worker", "ray.runtime_context")}
    yield
    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module


def read_job(environ: dict[str, str]) -> dict[str, str]:
    assert LAUNCHER.read_job is not None
    return LAUNCHER.read_job(environ)


def read_assignment() -> str | None:
    assert LAUNCHER.read_assignment is not None
    return LAUNCHER.read_assignment()


def test_a_worker_started_early_has_no_job_until_ray_tells_it() -> None:
    """RAY_JOB_ID=ffffffff names no job. The runtime context knows job and task."""
    assert read_job(BEFORE) == {"scheduler": "ray"}
    load(Context(), Worker())
    assert read_job(BEFORE) == {"scheduler": "ray", "ray_job": "01000000", "task": "train"}


def test_a_process_that_a_worker_started_has_the_job_of_the_variable() -> None:
    """It has not loaded Ray, and inherits RAY_JOB_ID."""
    assert read_job({"RAY_JOB_ID": "02000000"}) == {"scheduler": "ray", "ray_job": "02000000"}


class Actor(Context):
    """The context of an actor that has no name."""

    def get_actor_id(self) -> str:
        return "a1"

    def get_actor_name(self) -> str:
        return ""


class Named(Actor):
    """The context of an actor with a name."""

    def get_actor_name(self) -> str:
        return "learner"


class ActorWorker(Worker):
    """The worker of an actor of the class Trainer."""

    actor_id = "a1"
    actors = {"a1": type("Trainer", (), {})()}  # noqa: RUF012 - as Ray has it


@pytest.mark.parametrize(("context", "actor"), [(Actor(), "Trainer"), (Named(), "learner")])
def test_an_actor_is_called_by_its_name_or_else_its_class(context: Context, actor: str) -> None:
    """An actor runs one task after another, so none of them is recorded."""
    load(context, ActorWorker())
    assert read_job(BEFORE) == {"scheduler": "ray", "ray_job": "01000000", "actor": actor}


class Failing:
    """A context of which every question fails."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


class Strange:
    """A context that answers every question with something else than text."""

    def __getattr__(self, name: str) -> object:
        return lambda: 7


class Nameless(Actor):
    """An actor of which nothing knows the class."""


@pytest.mark.parametrize(
    "context", [None, object(), Failing(), Strange(), Nameless()], ids=lambda one: type(one).__name__
)
@pytest.mark.parametrize("worker", [None, object(), Worker()], ids=lambda one: type(one).__name__)
def test_another_version_of_ray_costs_nothing(context: object, worker: object) -> None:
    """Whatever Ray's modules answer, or do not have, the job is what is known, and nothing is raised."""
    load(context, worker)
    job = read_job({"RAY_JOB_ID": "02000000"})
    assert job["scheduler"] == "ray"
    assert "actor" not in job
    assert all(isinstance(value, str) for value in job.values())
    assert read_assignment() in (None, "")


def test_a_module_without_its_function_costs_nothing() -> None:
    """A Ray that keeps its context elsewhere tells nothing."""
    load(Context(), Worker())
    del sys.modules["ray.runtime_context"]
    assert read_job({"RAY_JOB_ID": "02000000"}) == {"scheduler": "ray", "ray_job": "02000000"}
    assert read_assignment() is None
