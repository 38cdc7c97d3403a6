"""What a process would lose under `[observe]` is on record, and the process has all that it has without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from tests.conftest import REPOSITORY
from tests.frameworks.harness import Ended, World, run_program

pytestmark = pytest.mark.tensorflow

GIB = 1 << 30
SCHEMA = Draft7Validator(json.loads((REPOSITORY / "schemas" / "audit.schema.json").read_text()))
OBSERVED = """
[observe]
tell = {tell}
[observe.ceiling]
memory_limit = "4GiB"
require_memory_growth = true
[observe.gpu]
visible_devices = [0]
"""
PROGRAM = """
import tensorflow as tf
print([device.name for device in tf.config.list_logical_devices("GPU")])
"""


def run_observed(folder: Path, policy: str | None, program: str, *, tell: bool) -> Ended:
    """Run a program of a user whose own file has tables under `[observe]`."""
    own = folder / "config" / "tfgpu" / "tfgpu.toml"
    own.parent.mkdir(parents=True)
    own.write_text(f'[audit]\nfile = "{folder}/audit.jsonl"\n{OBSERVED.format(tell=str(tell).lower())}')
    world = World(policy, gpus="2x24GiB")
    return run_program(world, program, folder, XDG_CONFIG_HOME=str(folder / "config"))


def read_outcomes(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    for record in records:
        SCHEMA.validate(record)
    return [record for record in records if record["event"] in ("policy_applied", "policy_clamped")]


def test_a_policy_that_only_observes_takes_nothing(tmp_path: Path) -> None:
    """TensorFlow has both cards whole. The record and the line say what it would lose, and the event is no clamp."""
    ended = run_observed(tmp_path, None, PROGRAM, tell=True)
    assert (ended.status, ended.stdout) == (0, "['/device:GPU:0', '/device:GPU:1']\n"), ended.stderr
    (record,) = read_outcomes(tmp_path)
    assert (record["event"], record["level"], record["status"]) == ("policy_applied", "info", "applied")
    assert [device["limit_bytes"] for device in record["devices"]] == [None, None]
    first, second = (device["uuid"] for device in record["devices"])
    lost = [(one["key"], one["gpu"], one["asked"], one["given"]) for one in record["would_clamp"]]
    assert lost[:2] == [("memory_limit", first, "no limit", "4.0 GiB"), ("visible_devices", second, second, "no GPU")]
    assert record["would_clamp"][0]["given_bytes"] == 4 * GIB
    assert record["would_clamp"][0]["held_by"].endswith("(observe.ceiling.memory_limit)")
    (line,) = ended.ours
    assert line.startswith("tfgpu: no limits yet; ")
    assert "under [observe] it would be 4.0 GiB instead of no limit, no GPU instead of GPU-" in line
