"""A policy as a Debian package, switched by a rename: the real dpkg, on a machine of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT
from tests.shared_machine import ALICE, SharedMachine, shared_machine
from tests.shared_machine import ROOT as ROOT_USER

__all__ = ["shared_machine"]

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg here"),
]

BUILD = ROOT / "sample_configs" / "fleet" / "deb" / "build"
POLICY = """
[machine]
revision = "@VERSION@"
[ceiling]
memory_limit = "{0}GiB"
"""
CASES = """
[[case]]
name = "everybody has eight"
gpus = "1x24GiB"
[case.expect]
memory_limit = "8GiB"
"""
#: What a reader sees: the limits of the machine's file and of alice's, which are of one version or of none.
READER = """
import sys
from tfenv.pipeline import current_start, load
seen = set()
for _ in range(400):
    loaded = load(current_start())
    assert not loaded.findings, loaded.findings
    limits = {ceiling.key: ceiling.value.bytes >> 30 for ceiling in loaded.policy.ceilings}
    assert limits["memory_limit"] == limits["memory_total"], limits
    seen.add((limits["memory_limit"], loaded.revision))
print(sorted(seen))
"""


class PackagedPolicy:
    """Builds and installs packages on a machine."""

    def __init__(self, machine: SharedMachine, folder: Path) -> None:
        self.machine, self.folder = machine, folder
        shutil.rmtree(machine.path("/etc/tfgpu"), ignore_errors=True)
        dpkg = machine.path(machine.folder("/var/lib/dpkg"))
        for name in ("info", "updates"):
            (dpkg / name).mkdir(exist_ok=True)
        (dpkg / "status").touch()

    def build(self, version: str, files: dict[str, str]) -> Path:
        """Build a package outside of the machine."""
        policy = self.folder / f"policy-{version}"
        for name, text in files.items():
            (policy / name).parent.mkdir(parents=True, exist_ok=True)
            (policy / name).write_text(text)
        subprocess.run([str(BUILD), str(policy), version], cwd=self.folder, check=True, capture_output=True, timeout=60)
        return self.folder / f"tfgpu-policy_{version}_all.deb"

    def dpkg(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        env = {"PATH": path, "PYTHONPATH": str(ROOT), "DEBIAN_FRONTEND": "noninteractive"}
        return self.machine.run(ROOT_USER, "dpkg", *arguments, env=env)

    def read_revision(self) -> str:
        """Return which version is in force for a user."""
        program = "from tfenv.pipeline import *; print(load(current_start()).revision)"
        done = self.machine.python(ALICE, program)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def packaged(shared_machine: SharedMachine, tmp_path: Path) -> PackagedPolicy:
    return PackagedPolicy(shared_machine, tmp_path)


def test_a_package_is_checked_before_it_is_in_force(packaged: PackagedPolicy) -> None:
    """A version with an error, or one that fails its tests, is refused, and the old one stays. A good one is taken."""
    first = packaged.build("1.0", {"tfgpu.toml": POLICY.format(8), "tfgpu.test.toml": CASES})
    done = packaged.dpkg("-i", str(first))
    assert done.returncode == 0, done.stderr
    assert packaged.read_revision() == "1.0"

    broken = packaged.build("1.1", {"tfgpu.toml": POLICY.format(8) + 'memory_total = "eight"\n'})
    done = packaged.dpkg("-i", str(broken))
    assert done.returncode != 0
    assert "1.1 has errors; the old policy stays in force" in done.stderr
    assert packaged.read_revision() == "1.0"

    failing = packaged.build("1.2", {"tfgpu.toml": POLICY.format(16), "tfgpu.test.toml": CASES})
    done = packaged.dpkg("-i", str(failing))
    assert "1.2 fails its tests; the old policy stays in force" in done.stderr
    assert packaged.read_revision() == "1.0"

    good = packaged.build("1.3", {"tfgpu.toml": POLICY.format(8), "tfgpu.test.toml": CASES})
    done = packaged.dpkg("-i", str(good))
    assert done.returncode == 0, done.stderr
    assert packaged.read_revision() == "1.3"
    assert packaged.dpkg("--purge", "tfgpu-policy").returncode == 0
    assert packaged.read_revision() == "None"


def test_no_reader_sees_half_of_a_switch(packaged: PackagedPolicy) -> None:
    """While the link changes again and again, each process has the machine's file and its user's of one version."""
    for version in ("8", "16"):
        files = {"tfgpu.toml": POLICY.format(version).replace("@VERSION@", version)}
        files["users/alice.toml"] = f'[ceiling]\nmemory_total = "{version}GiB"\n'
        for name, text in files.items():
            packaged.machine.write(f"/var/lib/tfgpu-policy/{version}/{name}", text)
    link = "ln -sfn /var/lib/tfgpu-policy/$v /etc/tfgpu.new; mv -T /etc/tfgpu.new /etc/tfgpu"
    switch = f"while true; do for v in 8 16; do {link}; done; done"
    assert packaged.machine.run(ROOT_USER, "ln", "-sfn", "/var/lib/tfgpu-policy/8", "/etc/tfgpu").returncode == 0
    enter = ["nsenter", f"--mount=/proc/{packaged.machine.process.pid}/ns/mnt", "sh", "-c", switch]
    switching = subprocess.Popen(enter)
    try:
        done = packaged.machine.python(ALICE, READER)
    finally:
        switching.kill()
        switching.wait()
    packaged.machine.path("/etc/tfgpu").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(8, '8'), (16, '16')]"
