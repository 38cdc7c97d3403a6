"""A Slurm of its own for the tests: munged, slurmctld and slurmd on the loopback, with four GPUs that are only files.

slurmd wants device nodes and looks at nothing behind them. Programs in a job see simulated GPUs.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from string import Template

_DAEMONS = ("munged", "slurmctld", "slurmd")
_COMMANDS = (*_DAEMONS, "sinfo", "srun", "sbatch")
#: Character device 195 is NVIDIA's.
_MAJOR = 195
_START_S = 60.0
#: Of the output of a daemon that did not start.
_LAST_CHARACTERS = 2000

_CONFIG = Template("""\
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=$task_plugin
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu,$shared
ReturnToService=2
MinJobAge=300
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 \
RealMemory=1000 Gres=gpu:a100:4,$shared:$shared_count State=UNKNOWN
PartitionName=gpu Nodes=$host Default=YES MaxTime=60 State=UP OverSubscribe=NO
$more
""")
_DEVICES = Template("""\
Name=gpu Type=a100 File=$folder/dev/nvidia[0-3]
Name=$shared Count=$shared_count
""")
_CGROUPS = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainDevices=yes
ConstrainCores=no
ConstrainRAMSpace=no
"""


class SlurmCluster:
    """One node with four GPUs, as `gres/gpu` and `gres/shard`, four shards a GPU, or `gres/mps`.

    Attributes:
        folder: Its configuration, state and logs.
        environ: What its commands need.
    """

    def __init__(self, folder: Path, *, shared: str = "shard", constrain_devices: bool = False, more: str = "") -> None:
        """
        Args:
            folder: For its files. It is made.
            shared: Which gres divides a GPU: "shard" or "mps".
            constrain_devices: A job's processes can open the job's device nodes alone.
            more: Further lines of slurm.conf.
        """
        self.folder = folder
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("dev", "state", "spool"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        for number in range(4):
            os.mknod(folder / "dev" / f"nvidia{number}", stat.S_IFCHR | 0o666, os.makedev(_MAJOR, number))
        values = {
            "host": socket.gethostname().partition(".")[0],
            "folder": folder,
            "controller_port": _find_free_port(),
            "node_port": _find_free_port(),
            "task_plugin": "task/cgroup" if constrain_devices else "task/none",
            "shared": shared,
            "shared_count": 16 if shared == "shard" else 400,
            "more": more,
        }
        (folder / "slurm.conf").write_text(_CONFIG.substitute(values))
        (folder / "gres.conf").write_text(_DEVICES.substitute(values))
        (folder / "cgroup.conf").write_text(_CGROUPS if constrain_devices else "")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)

    def start(self) -> None:
        """Start the daemons, and wait until the node takes jobs."""
        files = {"key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        munge = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._run_daemon("munged", "--force", f"--socket={self.folder / 'munge.sock'}", *munge)
        self._run_daemon("slurmctld", "-c")
        self._run_daemon("slurmd")
        deadline = time.monotonic() + _START_S
        while "idle" not in self.run("sinfo", "-h", "-o", "%T").stdout:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Slurm's node takes no jobs: {self._read_logs()}")
            time.sleep(0.1)

    def _run_daemon(self, name: str, *arguments: str) -> None:
        done = self.run(name, *arguments)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr or self._read_logs()}")

    def _read_logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-_LAST_CHARACTERS:] for path in self.folder.glob("*.log"))

    def stop(self) -> None:
        """End the jobs and the daemons."""
        self.run("scancel", "--user=root", "--state=RUNNING")
        for name in reversed(_DAEMONS):
            path = self.folder / f"{name}.pid"
            if path.exists():
                _end_process(int(path.read_text()))

    def run(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**(os.environ if env is None else env), **self.environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def srun(self, options: str, *command: str, cwd: Path, env: Mapping[str, str]) -> str:
        """Run a step. Return what it prints. A request that waits for GPUs is a mistake of the test."""
        done = self.run("srun", "--immediate=30", *options.split(), *command, cwd=cwd, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sbatch(self, options: str, script: str, cwd: Path, env: Mapping[str, str]) -> dict[str, str]:
        """Run a batch script to its end. Return what its jobs printed, by their ids: "14", or "14_0"."""
        path = cwd / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        done = self.run("sbatch", "--wait", "--output=%j.%A_%a.out", *options.split(), str(path), cwd=cwd, env=env)
        printed = {path.name: path.read_text() for path in cwd.glob("*.out")}
        assert done.returncode == 0, f"{done.stderr}\n{printed}"
        number = done.stdout.split()[-1]
        array = {name.split(".")[1]: text for name, text in printed.items() if f".{number}_" in name}
        return {number: next(iter(array.values()))} if "--array" not in options else array


def explain_missing_slurm() -> str | None:
    """Return why there can be no Slurm here. None: there can."""
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons"
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    return f"{', '.join(missing)} of Slurm is not installed here" if missing else None


def _find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _end_process(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while _is_running(pid):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
    except ProcessLookupError:
        return


def _is_running(pid: int) -> bool:
    """Return whether a process has not ended. In a container without an init nobody collects a daemon that has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
