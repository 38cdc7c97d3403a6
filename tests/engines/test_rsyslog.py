"""Real rsyslog between real network namespaces: the records of two machines in one place."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.pages import ROOT
from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.errors import Finding
from tfenv.policy.model import DeviceOutcome, Outcome, Subject

SAMPLES = ROOT / "sample_configs" / "fleet" / "rsyslog"
_MISSING = [tool for tool in ("rsyslogd", "ip") if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None]

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network namespace"),
    pytest.mark.skipif(bool(_MISSING), reason=f"there is no {', '.join(_MISSING)}"),
    pytest.mark.skipif(
        not list(Path("/usr/lib").glob("**/rsyslog/omrelp.so")), reason="rsyslog has no RELP (Debian: rsyslog-relp)"
    ),
]

COLLECTOR = "collector"
#: Each machine, and the collector's address on the wire between them.
WIRES = {"node1": "10.77.1", "node2": "10.77.2"}


class Network:
    """Two machines and a collector, each in a network namespace with an rsyslog of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"tf{os.getpid() % 10000}"
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def name(self, host: str) -> str:
        return f"{self.prefix}{host[-1]}"

    def run(self, *command: str) -> None:
        subprocess.run(["ip", *command], check=True, capture_output=True, timeout=30)

    def build(self) -> None:
        for host in (COLLECTOR, *WIRES):
            self.run("netns", "add", self.name(host))
        for host, wire in WIRES.items():
            ends = f"{self.name(host)}a", f"{self.name(host)}b"
            self.run(
                "link",
                "add",
                ends[0],
                "netns",
                self.name(host),
                "type",
                "veth",
                "peer",
                ends[1],
                "netns",
                self.name(COLLECTOR),
            )
            for place, end, number in ((host, ends[0], 2), (COLLECTOR, ends[1], 1)):
                self.run("-n", self.name(place), "address", "add", f"{wire}.{number}/24", "dev", end)
                self.run("-n", self.name(place), "link", "set", end, "up")

    def remove(self) -> None:
        for host in tuple(self.running):
            self.stop(host)
        for host in (COLLECTOR, *WIRES):
            subprocess.run(["ip", "netns", "delete", self.name(host)], check=False, capture_output=True, timeout=30)

    def log(self, host: str) -> Path:
        """Return the log of a user on a machine."""
        path = self.folder / host / "log" / "1000.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def collected(self, host: str) -> Path:
        """Return where the collector keeps what came from a machine's address."""
        return self.folder / "hosts" / f"{WIRES[host]}.2" / "audit.jsonl"

    def start(self, host: str) -> None:
        """Start a machine's rsyslog with the sample's configuration, in folders of its own."""
        place = self.folder / host
        (place / "spool").mkdir(parents=True, exist_ok=True)
        (place / "log").mkdir(exist_ok=True)
        text = (SAMPLES / ("collector.conf" if host == COLLECTOR else "host.conf")).read_text()
        for old, new in {
            "/var/spool/rsyslog": str(place / "spool"),
            "/var/log/tfgpu": str(place / "log"),
            "/srv/tfgpu": str(self.folder),
            "collector.example.org": f"{WIRES.get(host, '')}.1",
        }.items():
            text = text.replace(old, new)
        config = place / "rsyslog.conf"
        config.write_text(text)
        command = [
            "ip",
            "netns",
            "exec",
            self.name(host),
            "rsyslogd",
            "-n",
            "-f",
            str(config),
            "-i",
            str(place / "pid"),
        ]
        with (place / "messages").open("ab") as messages:
            self.running[host] = subprocess.Popen(command, stdout=messages, stderr=messages, cwd=place)

    def stop(self, host: str) -> None:
        process = self.running.pop(host)
        process.terminate()
        process.wait(60)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path)
    try:
        made.build()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"no network namespace here: {error.stderr.decode().strip()}")
    yield made
    made.remove()


def write_record(path: Path, host: str, pid: int, *, size: int = 0, user: str = "alice") -> bytes:
    """Append a record, as a program does, and return its line."""
    finding = Finding("clamped", "x" * size, "note")
    process = ProcessFacts(pid, 1, host, "/srv/train.py", "3.11.7", "tensorflow", "2.21.0")
    context = RecordContext(process, Subject(user, 1000, ("students",)), revision="1.4-2")
    outcome = Outcome(
        "applied", "TF_NewSession", (DeviceOutcome(0, "0", "GPU-8932f937", limit=1 << 30),), findings=(finding,)
    )
    line = encode_record(make_outcome_record(context, outcome).as_dict())
    with path.open("ab") as file:
        file.write(line)
    return line


def wait_for(network: Network, lines: Mapping[str, list[bytes]]) -> None:
    """Wait until the collector has just these lines of each machine."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = {host: read_lines(network.collected(host)) for host in lines}
        if found == {host: sorted(each) for host, each in lines.items()}:
            return
        time.sleep(0.2)
    messages = "\n".join((network.folder / host / "messages").read_text() for host in (COLLECTOR, *WIRES))
    counts = {host: (len(found[host]), len(lines[host])) for host in lines}
    pytest.fail(f"collected and written: {counts}\n{messages}")


def wait_for_most(network: Network, host: str, written: list[bytes]) -> list[bytes]:
    """Wait until the collector has all lines of a machine but one at most, and return what it has."""
    deadline, found = time.monotonic() + 60, list[bytes]()
    while time.monotonic() < deadline and len(found) < len(written) - 1:
        time.sleep(0.5)
        found = read_lines(network.collected(host))
    time.sleep(1)  # for the last one
    found = read_lines(network.collected(host))
    assert len(found) >= len(written) - 1
    assert set(found) <= set(written)
    assert len(set(found)) == len(found)
    return found


def read_lines(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines(keepends=True)) if path.exists() else []


def test_the_records_of_two_machines_arrive_whole_though_the_collector_was_away(network: Network) -> None:
    """Each line is as it was written, up to 4 KiB, under the address it came from. A break of the collector loses none.

    Where rsyslog itself is stopped during that break, it may lose the record that it was sending.
    """
    written: dict[str, list[bytes]] = {host: [] for host in WIRES}
    network.start(COLLECTOR)
    for host in WIRES:
        written[host].append(write_record(network.log(host), host, 1))  # before rsyslog runs
        network.start(host)
        written[host] += [write_record(network.log(host), host, pid, size=3_000) for pid in range(2, 50)]
    wait_for(network, written)
    assert max(map(len, written["node1"])) > 3_000

    network.stop(COLLECTOR)
    for host in WIRES:
        written[host] += [write_record(network.log(host), host, pid) for pid in range(100, 300)]
    network.stop("node2")  # its queue is kept
    network.start(COLLECTOR)
    network.start("node2")
    wait_for(network, {"node1": written["node1"]})
    written["node2"] = wait_for_most(network, "node2", written["node2"])

    # A record that lies about its host lies under its own address.
    written["node2"].append(write_record(network.log("node2"), "node1", 400, user="mallory"))
    wait_for(network, written)

    audit = [sys.executable, "-m", "tfenv", "audit"]
    options = ["--file", str(network.folder / "hosts"), "--format", "json"]
    rows = run_json([*audit, "summary", *options])
    count = len(written["node1"]) + len(written["node2"]) - 1
    # Both machines have had the same process numbers, and mallory's record says that it is of node1.
    assert [(row["user"], row["processes"]) for row in rows] == [("alice", count), ("mallory", 1)]
    rows = run_json([*audit, "revisions", *options])
    assert {(row["host"], row["revision"]) for row in rows} == {("node1", "1.4-2"), ("node2", "1.4-2")}


def run_json(command: list[str]) -> list[dict[str, object]]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_samples_name_no_machine_of_ours() -> None:
    """Their addresses are examples."""
    for path in SAMPLES.iterdir():
        assert not re.search(r"\d+\.\d+\.\d+\.\d+", path.read_text())
