"""What a file asks for and does not get is `clamped`, under real TensorFlow, with what was asked and what was given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from tests.conftest import REPOSITORY
from tests.frameworks.harness import Ended, World, run_program
from tests.selection import mark_rest
from tfenv.audit.gpu_totals import summarize_records

pytestmark = pytest.mark.usefixtures("needs_tensorflow")

GIB = 1 << 30
CREATE = "import tensorflow as tf\ntf.zeros([8])\n"


@dataclass(frozen=True)
class Wish:
    """A project's file under a user's ceilings.

    Attributes:
        gpu: What the project's file says.
        ceiling: What the user's file allows.
        asked: The findings' `asked` and `given`.
        sizes: Of each GPU that is created what the record says was asked of it and given: bytes, fraction, bytes.
        grant: CUDA_VISIBLE_DEVICES when the program starts.
        level: Of the record.
    """

    gpu: str
    ceiling: str
    asked: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[int | None, float | None, int | None], ...]
    grant: str | None = None
    level: str = "info"


GROWTH = ("memory_growth = false", "true")
WISHES = {
    "memory": Wish(
        'visible_devices = [0]\nmemory_limit = "70GiB"',
        'memory_limit = "12GiB"',
        (("memory_limit = 70.0 GiB", "12.0 GiB"),),
        ((70 * GIB, None, 12 * GIB),),
    ),
    "share": Wish(
        'visible_devices = [0]\nmemory_limit = "75%"',
        'memory_limit = "6GiB"',
        (("memory_limit = 75%", "6.0 GiB"),),
        ((18 * GIB, 0.75, 6 * GIB),),
    ),
    "no limit": Wish(
        'visible_devices = [0]\nmemory_limit = "none"',
        'memory_limit = "25%"',
        (('memory_limit = "none" (no limit)', "25%"),),
        ((24 * GIB, 1.0, 6 * GIB),),
    ),
    "one of two GPUs": Wish(
        'visible_devices = [0, 1]\nmemory_limit = "1GiB"\n[[gpu.device]]\nmatch = 1\nmemory_limit = "20GiB"',
        'memory_limit = "2GiB"',
        (("memory_limit = 20.0 GiB", "2.0 GiB"),),
        ((None, None, GIB), (20 * GIB, None, 2 * GIB)),
    ),
    "split": Wish(
        'visible_devices = [0]\n[[gpu.device]]\nmatch = 0\nlogical_devices = ["9GiB", "9GiB"]',
        'memory_limit = "6GiB"',
        (("logical_devices = 9.0 GiB, 9.0 GiB", "3.0 GiB, 3.0 GiB"),),
        ((18 * GIB, None, 6 * GIB),),
    ),
    "GPUs": Wish(
        "visible_devices = [0, 3]",
        "allowed_devices = [0, 1]",
        (("visible_devices = 0, 3", "0"),),
        ((None, None, None),),
    ),
    "GPUs, none of them": Wish(
        "visible_devices = [3]",
        "allowed_devices = [0, 1]",
        (("visible_devices = 3", "0, 1"),),
        ((None, None, None),) * 2,
        level="error",
    ),
    "number of GPUs": Wish(
        "visible_devices = [0, 1, 2]",
        "max_devices = 2",
        (("visible_devices = 0, 1, 2", "0, 1"),),
        ((None, None, None),) * 2,
    ),
    "number of free GPUs": Wish(
        "visible_devices = {count = 3}",
        "max_devices = 1",
        (("visible_devices = {count = 3}", "{count = 1}"),),
        ((None, None, None),),
    ),
    "more than the grant": Wish(
        "visible_devices = [0, 1]",
        "",
        (("visible_devices = 0, 1", "2"),),
        ((None, None, None),),
        grant="2",
        level="warning",
    ),
    "growth": Wish(
        "visible_devices = [0]\nmemory_growth = false",
        "require_memory_growth = true",
        (GROWTH,),
        ((None, None, None),),
    ),
    "allocator": Wish(
        'visible_devices = [0]\nallocator = "cuda_malloc_async"',
        'memory_limit = "2GiB"',
        (("allocator = cuda_malloc_async", "bfc"),),
        ((None, None, 2 * GIB),),
    ),
    "several": Wish(
        'visible_devices = [0]\nmemory_growth = false\nmemory_limit = "20GiB"',
        'memory_limit = "2GiB"\nrequire_memory_growth = true',
        (("memory_limit = 20.0 GiB", "2.0 GiB"), GROWTH),
        ((20 * GIB, None, 2 * GIB),),
    ),
}
#: The others are for `make test-all`: each imports TensorFlow.
ALWAYS = ("one of two GPUs", "several")


def run_under(folder: Path, gpu: str, ceiling: str, program: str = CREATE, grant: str | None = None) -> Ended:
    """Run a program in a project whose user has ceilings. Every record is valid against the schema."""
    user = folder / "config" / "tfgpu" / "tfgpu.toml"
    user.parent.mkdir(parents=True)
    user.write_text(f"[ceiling]\n{ceiling}\n", encoding="utf-8")
    inherited = () if grant is None else (("CUDA_VISIBLE_DEVICES", grant),)
    world = World(f"[gpu]\n{gpu}\n", inherited=inherited)
    ended = run_program(world, program, folder, XDG_CONFIG_HOME=str(folder / "config"))
    assert ended.status == 0, ended.stderr
    schema = Draft7Validator(json.loads((REPOSITORY / "schemas" / "audit.schema.json").read_text(encoding="utf-8")))
    for record in ended.records:
        schema.validate(record)
    return ended


def get_created(ended: Ended) -> dict[str, Any]:
    """Return the only record of devices that were created."""
    (record,) = [record for record in ended.records if record.get("devices") and "entry_point" in record]
    return record


@pytest.mark.parametrize("name", mark_rest(WISHES, ALWAYS))
def test_a_wish_of_a_file_that_is_cut_is_clamped(name: str, tmp_path: Path) -> None:
    """Whatever a file asks for and does not get, the record is `policy_clamped` and names asked, given, who and why."""
    wish = WISHES[name]
    ended = run_under(tmp_path, wish.gpu, wish.ceiling, grant=wish.grant)
    record = get_created(ended)
    assert (record["event"], record["status"], record["level"]) == ("policy_clamped", "clamped", wish.level)
    found = [finding for finding in record["findings"] if "asked" in finding]
    assert tuple((finding["asked"], finding["given"]) for finding in found) == wish.asked
    assert record["cut"] == sorted(asked.partition(" = ")[0] for asked, _ in wish.asked)
    assert {finding["asked_by"].partition(" (")[0] for finding in found} == {str(tmp_path / "tfgpu.toml")}
    held_by = "the grant (2)" if wish.grant else str(tmp_path / "config" / "tfgpu" / "tfgpu.toml")
    assert all(finding["held_by"].startswith(held_by) for finding in found)
    terms = ("asked_bytes", "asked_fraction", "limit_bytes")
    assert tuple(tuple(device.get(term) for term in terms) for device in record["devices"]) == wish.sizes
    rows = summarize_records(ended.records)
    assert [(row.asked_bytes, row.asked_fraction, row.given_bytes) for row in rows] == list(wish.sizes)
    assert all((row.clamped, list(row.cut)) == (1, record["cut"]) for row in rows)


NOT_CUT = {
    "within the ceiling": ('visible_devices = [0]\nmemory_limit = "2GiB"', 'memory_limit = "12GiB"'),
    "its own ceiling": ('memory_limit = "70GiB"\n[ceiling]\nmemory_limit = "2GiB"', 'memory_limit = "12GiB"'),
    "a GPU that is not there": ("visible_devices = [0, 9]", 'memory_limit = "12GiB"'),
}


@pytest.mark.parametrize("name", mark_rest(NOT_CUT, ("its own ceiling",)))
def test_what_nobody_took_away_is_not_clamped(name: str, tmp_path: Path) -> None:
    """A wish that is met, one that the same file's ceiling cuts, and a GPU that does not exist are `applied`."""
    record = get_created(run_under(tmp_path, *NOT_CUT[name]))
    assert (record["event"], record["status"], "cut" in record) == ("policy_applied", "applied", False)
    assert not any("asked_bytes" in device for device in record["devices"])


SESSIONS = """
import tensorflow as tf, tfenv
tf.zeros([8])
tf.compat.v1.Session()
status = tfenv.status()
print(*[outcome.status for outcome in status.outcomes])
print(sum(finding.code == "clamped" for finding in status.findings))
print(status._repr_html_())
"""


def test_each_session_under_a_cut_limit_is_clamped(tmp_path: Path) -> None:
    """Every entry point that creates GPUs says so, and so does `tfenv.status()`, as text and in a notebook."""
    ended = run_under(tmp_path, 'visible_devices = [0]\nmemory_limit = "70GiB"', 'memory_limit = "2GiB"', SESSIONS)
    statuses = [record["status"] for record in ended.records if "status" in record]
    assert statuses == ["clamped", "clamped"]
    first, count, *table = ended.stdout.splitlines()
    assert (first, count) == ("clamped clamped", "1")
    assert "clamped at TF_NewSessionOptions" in "".join(table)


CPU_ONLY = """
import tensorflow as tf
tf.config.list_physical_devices("GPU")
tf.config.set_visible_devices([], "GPU")
tf.zeros([8])
"""


def test_a_program_without_a_gpu_has_lost_nothing(tmp_path: Path) -> None:
    """A program that uses only the CPU is not on record as cut, whatever its files ask for."""
    ended = run_under(tmp_path, 'visible_devices = [0]\nmemory_limit = "70GiB"', 'memory_limit = "2GiB"', CPU_ONLY)
    assert [record["status"] for record in ended.records if "status" in record] == ["applied"]


BOTH = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = "0,3"
import tensorflow as tf
gpu = tf.config.list_physical_devices("GPU")[0]
tf.config.set_logical_device_configuration(gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=4000)])
tf.zeros([8])
"""


def test_the_larger_wish_of_program_and_file_is_summed_up(tmp_path: Path) -> None:
    """One record names what both asked for. The summary has the larger size as asked."""
    ended = run_under(tmp_path, 'memory_limit = "20GiB"', 'allowed_devices = [0]\nmemory_limit = "2GiB"', BOTH)
    record = get_created(ended)
    assert record["cut"] == ["CUDA_VISIBLE_DEVICES", "memory_limit", "virtual_devices"]
    asked = {finding["asked"]: finding["given"] for finding in record["findings"] if "asked" in finding}
    assert asked == {
        "CUDA_VISIBLE_DEVICES = 0, 3": "0",
        "memory_limit = 20.0 GiB": "2.0 GiB",
        "virtual_devices = [[4000.0]]": "2.0 GiB",
    }
    (row,) = summarize_records(ended.records)
    assert (row.asked_bytes, row.given_bytes, row.clamped) == (20 * GIB, 2 * GIB, 1)
