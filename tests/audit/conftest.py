"""Values that the tests of the audit share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.audit.sinks import COMPLAINED_VARIABLE
from tfenv.audit.stderr_line import SHOWN_VARIABLE
from tfenv.policy.model import DeviceOutcome, Grant, Outcome, Source, Subject

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process said: what one test makes it say does not silence the next."""
    for variable in (COMPLAINED_VARIABLE, SHOWN_VARIABLE):
        monkeypatch.setenv(variable, "")  # so that it is removed at the end, whoever sets it meanwhile
        monkeypatch.delenv(variable)


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    """Return the published schema of a record."""
    loaded: dict[str, Any] = json.loads((ROOT / "schemas" / "audit.schema.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def context() -> RecordContext:
    """Describe a program of this user, with a file in its project."""
    path = "/srv/vision/tfgpu.toml"
    return RecordContext(
        process=ProcessFacts.collect("tensorflow", "2.21.0"),
        subject=Subject("alice", os.geteuid(), project="/srv/vision"),
        grant=Grant(tokens=("0", "1")),
        sources=(Source("project", path),),
        sha256={path: "ab" * 32},
    )


@pytest.fixture
def outcome() -> Outcome:
    """Make an outcome of one GPU with a limit."""
    device = DeviceOutcome(0, "0", "GPU-8932f937-d72c", "NVIDIA H100", limit=8 << 30)
    return Outcome("applied", "TFE_ContextOptionsSetConfig", (device,), growth=True)


@pytest.fixture
def applied(context: RecordContext, outcome: Outcome) -> Any:
    """Make a record of that outcome."""
    return make_outcome_record(context, outcome, 0.5)


@pytest.fixture
def check_line(schema: dict[str, Any]) -> Callable[[bytes], dict[str, Any]]:
    """Return a function that checks one line against all that is promised of a record, and parses it."""
    validator = Draft7Validator(schema)

    def check(line: bytes) -> dict[str, Any]:
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert line.isascii()
        assert len(line) <= 4096
        assert line.startswith(b'{"timestamp":"')
        record: dict[str, Any] = json.loads(line)
        validator.validate(record)
        return record

    return check


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a program in a fresh interpreter that finds this checkout."""

    def run(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.fixture
def write_log(context: RecordContext) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that writes records with the given differences to a log and returns them."""

    def write(path: Path, *differences: dict[str, Any]) -> list[dict[str, Any]]:
        plain = make_outcome_record(context, Outcome("applied")).as_dict()
        records = [{**plain, **difference} for difference in differences]
        path.write_bytes(b"".join(encode_record(record) for record in records))
        return records

    return write
