"""Describing simulated GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tfenv.policy.units import MIB
from tfenv.simulate.environment import MAX_GPUS, SimulatedGpu, build_environment, parse_gpus

GIB = 1024 * MIB


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4x24GiB", (SimulatedGpu(24 * GIB),) * 4),
        ("24GiB", (SimulatedGpu(24 * GIB),)),
        ("2x24GiB,1x80GiB", (SimulatedGpu(24 * GIB), SimulatedGpu(24 * GIB), SimulatedGpu(80 * GIB))),
        ("2x24GiB:NVIDIA A100", (SimulatedGpu(24 * GIB, "NVIDIA A100"),) * 2),
        ("1x8GB:A, 1x512MiB:B", (SimulatedGpu(8 * 10**9, "A"), SimulatedGpu(512 * MIB, "B"))),
    ],
)
def test_reads_descriptions(text: str, expected: tuple[SimulatedGpu, ...]) -> None:
    """Groups are separated by commas, a name follows its group's size after a colon."""
    assert parse_gpus(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'write "4x24GiB"'),
        ("4x", 'write "4x24GiB"'),
        ("4x24", '"24" is not the size of a GPU; write "24GiB"'),
        ("4x24Gib,", 'write "4x24GiB"'),
        ("4x24G", '"G" is not a unit; write 24GiB'),
        ("0x24GiB", "from 1 to 32"),
        ("33x1GiB", "from 1 to 32"),
        ("20x1GiB,20x1GiB", "at most 32"),
        ("2x50%", "not the size of a GPU"),
        ("1.2.3GiB", '"1.2.3GiB" is not the size of a GPU; write "24GiB"'),
        ("2xnone", 'write "4x24GiB"'),
        ("foo", '"foo" does not describe GPUs; write "4x24GiB"'),
        ("1x1GiB:", "not a name for a GPU"),
        ("1x1GiB:a:b", "not a name for a GPU"),
        ("1x1GiB:a\nb", "not a name for a GPU"),
        ("1x1GiB:" + "é" * 48, "too long"),
    ],
)
def test_says_what_would_be_right(text: str, message: str) -> None:
    """A description that is none is refused in words that help."""
    with pytest.raises(ValueError, match=message):
        parse_gpus(text)


@pytest.mark.parametrize("sizes", [{"reserved": GIB}, {"reserved": -1}, {"context": -1}])
def test_sizes_no_card_has(sizes: dict[str, int]) -> None:
    """A driver leaves something of its card, and nobody takes less than nothing."""
    with pytest.raises(ValueError, match="cannot simulate a GPU of 1"):
        SimulatedGpu(GIB, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "dmem/", "dmem/-1", "dmem/100", "misc/2", "dmem:misc", "kernel"])
def test_who_keeps_limits_for_cgroups(text: str) -> None:
    """A word that names nobody is refused in words that help."""
    with pytest.raises(ValueError, match='does not say who keeps limits for cgroups; write "dmem"'):
        SimulatedGpu(GIB, cgroup_limits=text)


def test_one_driver_keeps_the_limits_of_all_gpus() -> None:
    """GPUs that differ in it are refused. The child is told of each."""
    gpus = [SimulatedGpu(GIB, cgroup_limits=text) for text in ("dmem/2", "dmem/2")]
    assert "cgroup_limits=dmem/2:dmem/2" in build_environment(gpus)["TFGPU_SIMULATE"].split(",")
    with pytest.raises(ValueError, match="give all GPUs the same cgroup_limits"):
        build_environment([*gpus, SimulatedGpu(GIB)])


def test_child_environment() -> None:
    """The child inherits what is there. The libraries come first on its library path."""
    gpus = [SimulatedGpu(24 * GIB), SimulatedGpu(80 * GIB, "H100", reserved=480 * MIB, context=518 * MIB)]
    result = build_environment(gpus, log=Path("log"), base={"A": "b", "LD_LIBRARY_PATH": "/lib"})
    folder, _, rest = result["LD_LIBRARY_PATH"].partition(":")
    assert Path(folder, "libcuda.so.1").is_file()
    assert (rest, result["A"]) == ("/lib", "b")
    settings = result["TFGPU_SIMULATE"].split(",")
    assert settings[:2] == ["count=2", "memory_mib=24576:81920"]
    assert {"reserved_mib=0:480", "context_mib=0:518", "name=Simulated GPU:H100"} <= set(settings)
    assert result["TFGPU_SIMULATE_LOG"] == str(Path.cwd() / "log")


def test_environment_of_a_simulation_is_not_inherited() -> None:
    """A simulation inside a simulation has its own log and its own list of processes."""
    base = {"TFGPU_SIMULATE_LOG": "/x", "TFGPU_SIMULATE_PROCESSES": "/y", "TFGPU_SIMULATE": "count=1"}
    result = build_environment([], base=base)
    assert not {"TFGPU_SIMULATE_LOG", "TFGPU_SIMULATE_PROCESSES"} & set(result)
    assert result["TFGPU_SIMULATE"].startswith("count=0,")


def test_c_sources_agree_on_the_limit() -> None:
    """MAX_GPUS here is MAX_GPUS of the C sources."""
    header = Path(__file__).parents[2] / "tfenv" / "simulate" / "machine.h"
    assert f"MAX_GPUS = {MAX_GPUS}," in header.read_text()
