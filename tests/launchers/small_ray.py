"""What Ray's modules answer in a worker, without a cluster: `assign("0,1")` does what Ray does before a task.

With real Ray the same is tested in tests/engines/test_ray.py. This one takes no cluster, so `make test` has it, too.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any


class Context:
    """Ray's runtime context of a worker."""

    assigned = ""

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        return {"GPU": self.assigned.split(",") if self.assigned else [], "TPU": []}

    def get_job_id(self) -> str:
        return "01000000"

    def get_actor_id(self) -> str | None:
        return None

    def get_actor_name(self) -> str | None:
        return None

    def get_task_name(self) -> str:
        return "train"


class Worker:
    """Ray's `global_worker`."""

    mode = 1


def load(context: object, worker: object) -> None:
    """Put modules of Ray's into sys.modules."""
    private, runtime_context = ModuleType("ray._private.worker"), ModuleType("ray.runtime_context")
    answers: dict[ModuleType, dict[str, Any]] = {
        private: {"global_worker": worker},
        runtime_context: {"get_runtime_context": lambda: context},
    }
    for module, names in answers.items():
        vars(module).update(names)
        sys.modules[module.__name__] = module


def assign(gpus: str) -> None:
    """Assign GPUs to the next task of this process, and set the variable as Ray does."""
    context = Context()
    context.assigned = gpus
    load(context, Worker())
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
