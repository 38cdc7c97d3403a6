"""The variables that JAX reads."""

from __future__ import annotations

import pytest

from tfenv.frameworks.jax.environment import find_library, find_sources, limit_by_variables, prepare_environment
from tfenv.policy.model import MemoryLimit, Origin, Plan, PlannedDevice

GIB = 1 << 30
LIMIT = Origin("project", "tfgpu.toml", ("gpu", "memory_limit"))
HALF = Plan(limit=MemoryLimit(fraction=0.5), limited_by=(LIMIT,), growth=True)
SIZED = PlannedDevice("0", limit=MemoryLimit(bytes=6 * GIB), cuda_total=24 * GIB, limited_by=(LIMIT,))
_POOL = "--xla_gpu_temp_buffer_use_separate_color"


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (_POOL, ""),
        (f"--xla_a=1 {_POOL}=true --xla_b", "--xla_a=1  --xla_b"),
        ("--xla_gpu_memory_fraction_policy=0.9 --xla_b", "--xla_b"),
        (f"{_POOL}=false", f"{_POOL}=false"),
        (f"{_POOL}_of_mine", f"{_POOL}_of_mine"),
    ],
)
def test_flags_that_take_memory_beside_a_limit_are_cleared(flags: str, left: str) -> None:
    """Flags that add a pool or replace the fraction go, others stay, and what went is noted."""
    environ = {"XLA_FLAGS": flags}
    notes = prepare_environment(HALF, environ)
    assert environ["XLA_FLAGS"] == left
    assert [note.code for note in notes] == ([] if flags == left else ["clamped"])


def test_managed_memory_is_cleared_under_a_limit_alone() -> None:
    """Without a limit there is nothing that it would defeat."""
    environ = {"TF_FORCE_UNIFIED_MEMORY": "1", "XLA_FLAGS": _POOL}
    assert prepare_environment(Plan(growth=True), environ) == []
    assert len(environ) == 2
    assert len(prepare_environment(HALF, environ)) == 2
    assert environ == {"XLA_FLAGS": ""}


def test_an_option_is_named_as_the_program_set_it() -> None:
    """Messages name the variable, or the setting of jax.config, that the program used."""
    environ = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    sources = find_sources(environ, {"allocator": "platform"})
    assert sources["memory_fraction"] == "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert sources["allocator"] == "jax_pjrt_client_create_options: allocator"
    assert sources["visible_devices"] == "jax_cuda_visible_devices"
    variable = {"JAX_PJRT_CLIENT_CREATE_OPTIONS": "memory_fraction:0.9"}
    assert find_sources(variable, "memory_fraction:0.9")["memory_fraction"].startswith("JAX_PJRT_CLIENT_CREATE_OPTIONS")


@pytest.mark.parametrize(
    ("plan", "environ", "fraction"),
    [
        (HALF, {}, "0.5000000"),
        (HALF, {"XLA_CLIENT_MEM_FRACTION": ".25"}, "0.2500000"),
        (HALF, {"XLA_CLIENT_MEM_FRACTION": "0.9"}, "0.5000000"),
        (Plan(devices=(SIZED,)), {}, "0.2500000"),
        (Plan(limit=MemoryLimit(bytes=GIB), limited_by=(LIMIT,)), {}, None),
    ],
)
def test_variables_hold_what_they_can_where_the_entry_point_is_missing(
    plan: Plan, environ: dict[str, str], fraction: str | None
) -> None:
    """A fraction is written where it is known, the smaller of the program's and the policy's."""
    limit_by_variables(plan, environ)
    assert environ.get("XLA_CLIENT_MEM_FRACTION") == fraction
    assert environ["XLA_PYTHON_CLIENT_ALLOCATOR"] == "default"
    assert environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == ("false" if plan.growth else None)


def test_the_old_name_of_the_fraction_is_kept() -> None:
    """JAX refuses both names together."""
    environ = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    limit_by_variables(HALF, environ)
    assert environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5000000"
    assert "XLA_CLIENT_MEM_FRACTION" not in environ


def test_a_plugin_is_found_by_its_name() -> None:
    """PJRT_NAMES_AND_LIBRARY_PATHS lists plugins."""
    environ = {"PJRT_NAMES_AND_LIBRARY_PATHS": "a:/lib/a.so,mine:/lib/cuda.so"}
    assert find_library("mine", environ) == "/lib/cuda.so"
    assert find_library("other", environ) == ""
