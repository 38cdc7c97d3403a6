"""Tables under [observe] in real programs: recorded and, if asked for, told, and never applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from tests.conftest import REPOSITORY
from tests.frameworks.harness import MIB, Ended, World, run_program

pytestmark = pytest.mark.timeout(300)

PROJECT = '[gpu]\nvisible_devices = [0, 1]\nmemory_growth = true\nmemory_limit = "2000MiB"\n'
OBSERVED = '[observe]\ntell = {tell}\n[observe.ceiling]\nmemory_limit = "1000MiB"\n'
PROGRAMS = {
    "tensorflow": """
import tensorflow as tf
print(len(tf.config.list_logical_devices("GPU")), tf.zeros([375, 1 << 20]).shape)
""",
    "jax": """
import jax, numpy as np
print(jax.local_device_count(), jax.device_put(np.zeros((375, 1 << 20), np.float32)).block_until_ready().shape)
""",
}
#: Asked for 1500 MiB, more than the 1000 that are tried, on the first GPU.
PRINTED = {"tensorflow": "2 (375, 1048576)\n", "jax": "2 (375, 1048576)\n"}
#: What the program sees of itself: neither the outcome nor the plan knows of what is observed but by `would_clamp`.
STATUS = """
import json, tfenv
told = tfenv.status().as_dict()
for outcome in told["outcomes"]:
    outcome.pop("would_clamp")
    outcome["findings"] = [one for one in outcome["findings"] if one["code"] != "not-observed"]
told["findings"] = [one for one in told["findings"] if one["code"] != "not-observed"]
told["sources"] = [path for path in told["sources"] if not path.endswith("site.toml")]
told["summary"] = told["summary"].replace("site.toml, ", "")
print(json.dumps(told, sort_keys=True))
"""
BREAK = """
import sys, types
sys.modules["tfenv.policy.observe"] = types.ModuleType("tfenv.policy.observe")
"""


def run_observed(framework: str, site: str | None, folder: Path, program: str) -> Ended:
    folder.mkdir(exist_ok=True)
    (folder / "site.toml").write_text(site or "")
    return run_program(
        World(PROJECT, gpus="2x24GiB", framework=framework),
        program,
        folder,
        TFGPU_SITE_CONFIG=str(folder / "site.toml"),
    )


def find_applied(ended: Ended) -> dict[str, Any]:
    return next(record for record in ended.records if record["event"] == "policy_applied")


@pytest.mark.parametrize(
    ("framework", "tell"),
    [
        pytest.param("tensorflow", "true", marks=pytest.mark.tensorflow),
        pytest.param("jax", "false", marks=pytest.mark.jax),
    ],
)
def test_what_is_observed_is_recorded_and_not_applied(
    framework: str, tell: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A program takes 1500 MiB where 1000 are tried. Its record says so, and its line if the table says `tell`."""
    request.getfixturevalue(f"needs_{framework}")
    ended = run_observed(framework, OBSERVED.format(tell=tell), tmp_path, PROGRAMS[framework])
    assert (ended.status, ended.stdout) == (0, PRINTED[framework]), ended.stderr
    applied = find_applied(ended)
    lost = [(entry["key"], entry["asked_bytes"], entry["given_bytes"]) for entry in applied["would_clamp"]]
    assert lost == [("memory_limit", 2000 * MIB, 1000 * MIB)] * 2
    assert [entry["gpu"] for entry in applied["would_clamp"]] == [device["uuid"] for device in applied["devices"]]
    assert {entry["held_by"] for entry in applied["would_clamp"]} == {
        f"{tmp_path}/site.toml (observe.ceiling.memory_limit)"
    }
    assert [device["limit_bytes"] for device in applied["devices"]] == [2000 * MIB] * 2
    schema = json.loads((REPOSITORY / "schemas" / "audit.schema.json").read_text())
    assert not [error for record in ended.records for error in Draft7Validator(schema).iter_errors(record)]
    (line,) = ended.ours
    assert line.endswith("; under [observe] it would be 1000.0 MiB instead of 2.0 GiB") == (tell == "true")
    assert ("observe" in line) == (tell == "true")


@pytest.mark.exhaustive
def test_a_fault_in_observing_touches_nothing(needs_tensorflow: None, tmp_path: Path) -> None:
    """With a broken module in the way the program, its status and its plan are as without tables to observe."""
    program = PROGRAMS["tensorflow"] + STATUS
    plain = run_observed("tensorflow", None, tmp_path / "plain", program)
    broken = run_observed("tensorflow", OBSERVED.format(tell="true"), tmp_path / "broken", BREAK + program)
    assert plain.status == broken.status == 0, broken.stderr
    assert broken.stdout.replace("/broken/", "/plain/") == plain.stdout
    applied, as_ever = find_applied(broken), find_applied(plain)
    (finding,) = [finding for finding in applied["findings"] if finding["code"] == "not-observed"]
    assert finding["severity"] == "note"
    assert "could not tell what [observe] would take: ImportError: " in finding["message"]
    assert "would_clamp" not in applied
    for name in ("status", "visible", "devices", "growth", "limit_bytes"):
        assert applied.get(name) == as_ever.get(name)
    assert [line.replace("site.toml, ", "") for line in broken.ours] == [
        line.replace("site.toml, ", "") for line in plain.ours
    ]
