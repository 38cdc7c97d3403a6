"""`tfgpu check` on `[gpu.frameworks]`: what the frameworks cannot keep, and shares that do not fit."""

from __future__ import annotations

import pytest

from tfenv.config.document import Trust, read
from tfenv.config.schema import validate
from tfenv.errors import Finding
from tfenv.lint.combinations import advise
from tfenv.policy.model import Device, Inventory, Source

GIB = 1 << 30
SPLIT = '[[gpu.device]]\nmatch = 0\nlogical_devices = ["1GiB", "1GiB"]\n'


def lint(text: str, *totals: int) -> list[tuple[str, str, int | None]]:
    """The code, message and line of each remark on a project's file, on a machine with cards of these sizes."""
    document = read(Source("project", "/srv/p/tfgpu.toml", text=text), Trust(0))
    layer, faults = validate(document)
    assert faults == ()
    cards = tuple(Device(index, f"GPU-{index}", "Card", total) for index, total in enumerate(totals))
    found: tuple[Finding, ...] = advise([layer], [document], Inventory(cards or None))
    return [(finding.code, finding.message, finding.line) for finding in found]


def test_a_split_that_jax_cannot_keep_is_found() -> None:
    """A file whose shares name JAX and split a GPU says where, and what happens in its place."""
    found = lint(f'[gpu.frameworks]\njax = "2GiB"\n{SPLIT}')
    assert found == [("unsupported", "JAX cannot split a GPU, so the limit applies to all of it", 3)]


def test_a_split_for_tensorflow_is_right() -> None:
    """TensorFlow splits GPUs, and a file without shares may be for TensorFlow alone."""
    assert lint(f'[gpu.frameworks]\ntensorflow = "2GiB"\n{SPLIT}') == []
    assert lint(SPLIT) == []
    assert lint(f'[gpu.frameworks]\ntensorflow = "2GiB"\njax = "2GiB"\n{SPLIT}') == []


def test_an_allocator_that_pytorch_cannot_choose_is_found() -> None:
    """PyTorch has no choice of an allocator once it is loaded."""
    found = lint('[gpu]\nallocator = "bfc"\n[gpu.frameworks]\ntorch = "2GiB"\n')
    assert [(code, line) for code, _, line in found] == [("unsupported", 2)]


@pytest.mark.parametrize(
    ("limit", "jax", "tensorflow"), [("8GiB", "6GiB", "3GiB"), ("50%", "40%", "20%"), ("8GiB", "30%", "4GiB")]
)
def test_shares_above_the_limit_are_found(limit: str, jax: str, tensorflow: str) -> None:
    """Shares that are larger together than the limit are found, of unlike kinds once the cards are known."""
    text = f'[gpu]\nmemory_limit = "{limit}"\n[gpu.frameworks]\njax = "{jax}"\ntensorflow = "{tensorflow}"\n'
    (finding,) = lint(text, 24 * GIB, 24 * GIB)
    assert finding[0] == "above-ceiling"
    assert finding[1].startswith("the shares are larger together than memory_limit")
    assert lint(text.replace(f'"{tensorflow}"', '"1%"' if "%" in tensorflow else '"512MiB"'), 24 * GIB) == []
