"""The site's file in a real program: a default that gives way to a project's, and a ceiling that does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from tests.conftest import REPOSITORY
from tests.frameworks.harness import Ended, World, run_program

GIB = 1 << 30
PROGRAM = """
import os
os.environ["TFGPU_SITE_CONFIG"] = "/nowhere/late.toml"  # too late
import tensorflow as tf
print("GPUs", len(tf.config.list_physical_devices("GPU")), tf.zeros([8]).device)
"""
SITES = {
    "a setting gives way": ("[gpu]\nmemory_limit = '20GiB'\n", "2GiB", 2 * GIB),
    "a ceiling holds": ("[ceiling]\nmemory_limit = '4GiB'\n", "8GiB", 4 * GIB),
}


def run_under_site(site: str, project: str, folder: Path, **variables: str) -> Ended:
    (folder / "site.toml").write_text(site)
    return run_program(World(project, gpus="1x24GiB"), PROGRAM, folder, TFGPU_SITE_CONFIG="site.toml", **variables)


@pytest.mark.parametrize(("site", "wanted", "given"), SITES.values(), ids=SITES)
def test_what_a_project_gets_under_a_sites_file(
    site: str, wanted: str, given: int, needs_tensorflow: None, tmp_path: Path
) -> None:
    """The driver is asked for what the nearest setting and all ceilings say, and the record names the layers."""
    ended = run_under_site(site, f"[gpu]\nmemory_limit = '{wanted}'\n", tmp_path)
    assert ended.stdout == "GPUs 1 /job:localhost/replica:0/task:0/device:GPU:0\n"
    most = max(request.bytes for request in ended.requests if request.op == "alloc")
    assert most == given
    (loaded,) = [record for record in ended.records if record["event"] == "policy_loaded"]
    assert [source["layer"] for source in loaded["sources"]] == ["site", "project"]
    assert loaded["findings"] == [] or [finding["code"] for finding in loaded["findings"]] == ["clamped"]
    schema = json.loads((REPOSITORY / "schemas" / "audit.schema.json").read_text())
    assert not [error for record in ended.records for error in Draft7Validator(schema).iter_errors(record)]


def test_the_record_says_which_file_tfgpu_config_replaced(needs_tensorflow: None, tmp_path: Path) -> None:
    """A job's file of 20 GiB hides a project's 2 GiB. The log has a note with the path, and stderr no warning."""
    job = tmp_path / "job" / "job.toml"
    job.parent.mkdir()
    job.write_text("[gpu]\nmemory_limit = '20GiB'\n")
    log = f"[audit]\nfile = '{tmp_path}/audit.jsonl'\n"
    ended = run_under_site(log, "[gpu]\nmemory_limit = '2GiB'\n", tmp_path, TFGPU_CONFIG=str(job))
    (loaded,) = [record for record in ended.records if record["event"] == "policy_loaded"]
    (finding,) = loaded["findings"]
    assert (finding["code"], finding["severity"]) == ("project-replaced", "note")
    assert str(tmp_path / "tfgpu.toml") in finding["message"]
    assert [("20.0 GiB" in line, "warning" in line) for line in ended.ours] == [(True, False)]
