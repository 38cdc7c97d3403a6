"""Containers of a real Docker that share GPUs: leases, users, and what the recipe says.

Each run starts a dockerd of its own in a temporary folder. Its containers have no network and no files of an image but
some folders: they run this interpreter and this checkout, on simulated GPUs. The command is the recipe's.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, SimulatedGpus
from tests.pages import Block, blocks
from tfenv.policy.model import Lease
from tfenv.sharing import lease as leases
from tfenv.sharing.queue import Acquired, acquire
from tfenv.sharing.request import Candidate, GpuRequest
from tfenv.simulate.build import build_libraries

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(600)]

CONTENDER = Path(__file__).with_name("contender.py")
MESSAGES = REPOSITORY / "docs" / "messages.md"
RECIPE = REPOSITORY / "docs" / "recipes" / "docker.md"
#: Seconds for what takes one or two on a quiet machine.
PATIENCE = 180
GIB = 1 << 30
GPUS = [f"GPU-a{number}fa4e00-0000-4000-8000-00000000000{number}" for number in range(4)]
QUIET = '\n[audit]\nfile = "none"\nstderr = "none"\n'
ONE_CARD = "[gpu]\nvisible_devices = { count = 1 }\n" + QUIET
DOCTOR = ("doctor", "--no-tensorflow", "--format", "json")

_FOLDERS = ("app", "dev", "etc", "proc", "root", "run", "run/lock", "sys", "tmp", "usr", "var", "var/log")
_OPEN_FOLDERS = ("run/lock", "tmp")
#: As in an image of Debian. A user with the uid 4711 has no entry.
_USERS = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n"


class Docker:
    """A dockerd of its own, and a folder that is the host for its containers.

    Attributes:
        folder: Everything of it.
        host: Stands for the host's / in the recipe's volumes.
        problem: Why it cannot be used. None: it works.
    """

    def __init__(self, *options: str, prefix: Sequence[str] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tfgpu-docker-"))
        self.folder.chmod(0o755)
        self.host = self.folder / "host"
        self.socket = self.folder / "socket"
        self.libraries = self.folder / "lib"
        self.names: list[str] = []
        namespace = f"tfgpu-{os.urandom(6).hex()}"  # of a containerd that may serve the machine's own Docker, too
        command = [
            *prefix, "dockerd", "--bridge=none", "--iptables=false", "--ip-forward=false", "--storage-driver=vfs",
            f"--containerd-namespace={namespace}", f"--containerd-plugins-namespace={namespace}-plugins",
            f"--host=unix://{self.socket}", f"--data-root={self.folder}/data", f"--exec-root={self.folder}/exec",
            f"--pidfile={self.folder}/pid", *options,
        ]  # fmt: skip
        with (self.folder / "dockerd.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.problem = self._find_problem()

    def _find_problem(self) -> str | None:
        until = time.monotonic() + PATIENCE
        while (done := self("info", check=False)).returncode:
            if self.process.poll() is not None or time.monotonic() > until:
                return (self.folder / "dockerd.log").read_text(errors="replace").strip().rpartition("\n")[2]
            time.sleep(0.1)
        shutil.copytree(build_libraries(), self.libraries)  # which only this user may read
        self.libraries.chmod(0o755)
        image = _pack_image()
        self("import", "--change", "WORKDIR /app", "-", "vision", data=image)
        done = self(*self.make_command(["true"]), check=False)
        return done.stderr.strip() or None if done.returncode else None

    def __call__(self, *words: str, check: bool = True, data: bytes | None = None) -> subprocess.CompletedProcess[str]:
        """Run `docker`."""
        done = subprocess.run(
            ["docker", "--host", f"unix://{self.socket}", *words],
            input=data, capture_output=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        result = subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())
        assert not check or result.returncode == 0, (words, result.stdout, result.stderr)
        return result

    def make_command(
        self, command: Sequence[str], *options: str, share_leases: bool = True, gpus: str | None = None
    ) -> list[str]:
        """Return the words after `docker` of the recipe's command, with the host's folders and GPUs simulated.

        Args:
            command: What to run instead of `python train.py`.
            options: More options of `docker run`.
            share_leases: Keep the last volume of the command.
            gpus: The value of TFGPU_SIMULATE. None: no GPUs.
        """
        words = shlex.split(find_command().text.replace("\\\n", " "))
        assert words[:2] == ["docker", "run"]
        assert words[-3:] == ["vision", "python", "train.py"]
        kept = [word for word in words[1:-3] if word not in ("--rm", "--gpus", "all")]
        result = kept[:1]
        for option, volume in pairs_after(kept[1:]):
            if volume is None:
                result.append(option)
            elif share_leases or not volume.startswith("/run/lock/"):
                result += [option, self._place_on_host(volume)]
        for folder in (self.libraries, *find_needed_folders()):
            result += ["--volume", f"{folder}:{folder}:ro"]
        variables = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "HOME": "/tmp"}
        if gpus is not None:
            variables |= {"TFGPU_SIMULATE": gpus, "LD_LIBRARY_PATH": str(self.libraries)}
        for name, value in variables.items():
            result += ["--env", f"{name}={value}"]
        return [*result, *options, "vision", *command]

    def _place_on_host(self, volume: str) -> str:
        return f"{self.host}{volume}"

    def write(self, path: str, text: str) -> Path:
        """Write a file of the host, readable for everybody."""
        file = Path(f"{self.host}{path}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for place in (file, *file.parents):
            if place == self.folder:
                break
            place.chmod(0o644 if place == file else 0o755)
        return file

    def clear_host(self) -> None:
        """Make the host's folders anew: no policy, the logs and the leases open to everybody."""
        shutil.rmtree(self.host, ignore_errors=True)
        for path, mode in (("etc/tfgpu", 0o755), ("var/log/tfgpu", 0o1733), ("run/lock/tfgpu", 0o1777)):
            (self.host / path).mkdir(parents=True)
            (self.host / path).chmod(mode)

    def start(self, name: str, words: Sequence[str]) -> str:
        """Start a container in the background, and return its name."""
        unique = f"{name}-{os.urandom(3).hex()}"
        run, *rest = words
        self.names.append(unique)
        self(run, "--detach", "--name", unique, "--hostname", name, *rest)
        return unique

    def remove_all(self) -> None:
        """Remove the containers of a test."""
        if self.names:
            self("rm", "--force", *self.names, check=False)
        self.names.clear()

    def close(self) -> None:
        """End dockerd, which ends its containers and its containerd, and remove all that it made."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError, ValueError):  # it is there only if dockerd was killed
            os.kill(int((self.folder / "exec" / "containerd" / "containerd.pid").read_text()), signal.SIGKILL)
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            mounts = [line.split()[4] for line in file]
        for mount in reversed(mounts):
            if mount.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def pairs_after(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options of a command with the values of --volume."""
    rest = iter(words)
    for word in rest:
        yield word, next(rest) if word == "--volume" else None


def find_command() -> Block:
    """Return the recipe's `docker run`."""
    (block,) = [block for block in blocks("bash", pages=[RECIPE]) if block.text.startswith("docker run")]
    return block


def find_needed_folders() -> list[Path]:
    """Return this interpreter, its packages and the checkout, none of them inside another one."""
    found = {Path("/usr"), Path(sys.prefix), Path(sys.base_prefix), REPOSITORY}
    found |= {Path(entry) for entry in sys.path if entry.endswith("site-packages")}
    # The links that lead to an interpreter may be in a virtual environment that is in the checkout of another one.
    found |= {Path(sys.executable).resolve().parents[1]}
    found |= {Path(f"/{name}") for name in ("bin", "lib", "lib64") if not Path(f"/{name}").is_symlink()}
    return sorted(folder for folder in found if folder.exists() and not found.intersection(folder.parents))


def _pack_image() -> bytes:
    """Return an image of empty folders, users, and the links of / to /usr."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in _FOLDERS:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder in _OPEN_FOLDERS else 0o755
            archive.addfile(entry)
        for link in ("bin", "lib", "lib64"):
            if (path := Path("/", link)).is_symlink():
                archive.add(path, link)
        users = tarfile.TarInfo("etc/passwd")
        users.size, users.mode = len(_USERS), 0o644
        archive.addfile(users, io.BytesIO(_USERS.encode()))
    return buffer.getvalue()


def start_docker(*options: str, prefix: Sequence[str] = ()) -> Docker:
    """Start a dockerd, or skip the test with the reason."""
    missing = [tool for tool in ("dockerd", "docker", "containerd", "runc") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"there is no {', '.join(missing)}" if missing else "only root can start dockerd")
    docker = Docker(*options, prefix=prefix)
    if docker.problem is not None:
        problem = docker.problem
        docker.close()
        pytest.skip(f"Docker does not work here: {problem}")
    return docker


@pytest.fixture(scope="module")
def dockerd() -> Iterator[Docker]:
    docker = start_docker()
    yield docker
    docker.close()


@pytest.fixture
def docker(dockerd: Docker) -> Iterator[Docker]:
    """A Docker without containers, on a host without a policy."""
    dockerd.clear_host()
    yield dockerd
    dockerd.remove_all()


class Contest:
    """Containers that ask for GPUs at the same moment, in one round after the other."""

    def __init__(self, docker: Docker, gpus: str | None, rounds: int = 1) -> None:
        self.docker = docker
        self.gpus = gpus
        self.rounds = rounds
        self.containers: dict[str, str] = {}
        self.folder = docker.host / "contest"
        self.folder.mkdir()
        self.folder.chmod(0o1777)
        (docker.host / "app").mkdir(exist_ok=True)
        shutil.copy(CONTENDER, docker.host / "app" / "train.py")

    def add(self, name: str, *options: str, share_leases: bool = True, prefix: Sequence[str] = ()) -> None:
        """Start a container of this name, which waits for the rounds to begin. `prefix` comes before its command."""
        orders = json.dumps({"folder": "/contest", "rounds": self.rounds})
        volumes = [f"--volume={self.folder}:/contest", f"--volume={self.docker.host}/app:/app:ro"]
        words = self.docker.make_command(
            [*prefix, "python", "train.py"], "--env", f"CONTENDER={orders}", *volumes, *options,
            share_leases=share_leases, gpus=self.gpus,
        )  # fmt: skip
        self.containers[name] = self.docker.start(name, words)

    def begin(self, number: int = 0) -> None:
        """Let all begin a round as soon as all of them wait for it."""
        for name in self.containers:
            self.wait_for(f"ready-{name}")
        (self.folder / f"begin-{number}").touch()

    def end(self, number: int = 0) -> None:
        (self.folder / f"end-{number}").touch()

    def read(self, name: str, number: int = 0) -> dict[str, Any]:
        """Wait until a container was given something, and return that."""
        self.wait_for(f"{number}-{name}")
        given: dict[str, Any] = json.loads((self.folder / f"{number}-{name}").read_text())
        assert "error" not in given, given["error"]
        return given

    def read_all(self, number: int = 0) -> dict[str, dict[str, Any]]:
        return {name: self.read(name, number) for name in self.containers}

    def run_to_the_end(self, number: int = 0) -> dict[str, dict[str, Any]]:
        """Return what all were given in the last round, after their processes ended."""
        given = self.read_all(number)
        self.end(number)
        for unique in self.containers.values():
            self.docker("wait", unique)
        return given

    def wait_for(self, file: str) -> None:
        until = time.monotonic() + PATIENCE
        while not (self.folder / file).exists():
            assert time.monotonic() < until, (file, self.read_logs())
            time.sleep(0.005)

    def read_logs(self) -> dict[str, str]:
        found = {name: self.docker("logs", unique, check=False) for name, unique in self.containers.items()}
        return {name: done.stdout + done.stderr for name, done in found.items()}


Simulate = Callable[[str], str]


@pytest.fixture
def simulate(simulated_gpus: SimulatedGpus) -> Simulate:
    """Return what TFGPU_SIMULATE is for a description of GPUs."""
    return lambda gpus: simulated_gpus(gpus)["TFGPU_SIMULATE"]


# ---- leases


def test_containers_that_start_at_once_take_different_cards(docker: Docker, simulate: Simulate) -> None:
    """Four containers that want one card each have four different ones, in every one of twenty rounds."""
    docker.write("/etc/tfgpu/tfgpu.toml", ONE_CARD)
    contest = Contest(docker, simulate("4x24GiB"), rounds=20)
    for name in "abcd":
        contest.add(name)
    overlaps = 0
    for number in range(contest.rounds):
        contest.begin(number)
        given = contest.read_all(number)
        assert sorted(gpu for each in given.values() for gpu in each["gpus"]) == GPUS
        assert [each["findings"] for each in given.values()] == [[]] * 4
        overlaps += max(each["asked"] for each in given.values()) < min(each["entered"] for each in given.values())
        contest.end(number)
    assert overlaps, "no round in which all asked before the first one had its card"


def test_limited_containers_share_a_card(docker: Docker, simulate: Simulate) -> None:
    """Two containers of 11 GiB fit on a card of 24. The fifth on two cards sees none, and the others keep theirs."""
    choice = 'visible_devices = { count = 1, when_busy = "cpu" }\nmemory_limit = "11GiB"\n'
    docker.write("/etc/tfgpu/tfgpu.toml", f"[gpu]\n{choice}{QUIET}")
    contest = Contest(docker, simulate("2x24GiB"), rounds=5)
    for name in "abcde":
        contest.add(name)
    for number in range(contest.rounds):
        contest.begin(number)
        given = contest.read_all(number)
        taken = sorted(gpu for each in given.values() for gpu in each["gpus"])
        assert taken == [GPUS[0], GPUS[0], GPUS[1], GPUS[1]]
        assert [each["visible"] for each in given.values() if not each["gpus"]] == ["-1"]
        assert {size for each in given.values() for size in each["gpus"].values()} == {11 * GIB}
        contest.end(number)


def test_a_killed_container_frees_its_card(docker: Docker, simulate: Simulate) -> None:
    """A container waits for the card of another one, and has it after `docker kill` of that."""
    docker.write("/etc/tfgpu/tfgpu.toml", ONE_CARD.replace('stderr = "none"', ""))
    contest = Contest(docker, simulate("1x24GiB"))
    contest.add("first")
    contest.begin()
    assert list(contest.read("first")["gpus"]) == GPUS[:1]
    contest.add("second")
    contest.wait_for("ready-second")
    until = time.monotonic() + PATIENCE
    while "waiting for a free GPU" not in (told := contest.read_logs()["second"]):
        assert time.monotonic() < until, told
        time.sleep(0.1)
    assert "GPU 0: root (in another container train.py) all of it" in told
    assert not (contest.folder / "0-second").exists()
    docker("kill", contest.containers["first"])
    assert list(contest.read("second")["gpus"]) == GPUS[:1]


def test_the_users_of_containers_agree(docker: Docker, simulate: Simulate) -> None:
    """Root, a user of the image and a uid without an entry have different cards, and the host names all of them."""
    docker.write("/etc/tfgpu/tfgpu.toml", ONE_CARD)
    contest = Contest(docker, simulate("4x24GiB"))
    for name, user in {"a": "0", "b": "1000", "c": "4711:4711"}.items():
        contest.add(name, "--user", user)
    contest.begin()
    given = contest.read_all()
    assert {each["uid"] for each in given.values()} == {0, 1000, 4711}
    assert len({gpu for each in given.values() for gpu in each["gpus"]}) == 3
    seen = {lease.uid: (lease.allocation.uuid, lease.pid) for lease in read_leases_of_host(docker)}
    assert {uid: gpu for uid, (gpu, _) in seen.items()} == {
        each["uid"]: next(iter(each["gpus"])) for each in given.values()
    }
    for _, pid in seen.values():
        assert b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes(), "its number on the host"


def test_a_process_of_the_host_counts_in_containers(docker: Docker, simulate: Simulate) -> None:
    """The host has the first card, so a container takes the second one."""
    docker.write("/etc/tfgpu/tfgpu.toml", ONE_CARD)
    contest = Contest(docker, simulate("2x24GiB"))
    contest.add("a")
    program = "from tests.engines.test_docker import hold_on_host; import sys; hold_on_host(*sys.argv[1:])"
    command = [sys.executable, "-c", program, str(docker.host), GPUS[0]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        contest.begin()
        assert list(contest.read("a")["gpus"]) == GPUS[1:2]
        holder.communicate("")


def hold_on_host(host: str, gpu: str) -> None:
    """Hold a card as a process of the host does, until stdin ends."""
    leases.list_lease_directories = lambda: (f"{host}/run/lock/tfgpu",)
    assert isinstance(acquire(GpuRequest(0, (Candidate(gpu, 24 * GIB, None),), 1), dict), Acquired)
    print("held", flush=True)
    sys.stdin.read()


def read_leases_of_host(docker: Docker) -> tuple[Lease, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "list_lease_directories", lambda: (f"{docker.host}/run/lock/tfgpu",))
        return leases.read_leases()


def test_leases_that_are_not_shared_are_said(docker: Docker, simulate: Simulate) -> None:
    """Without the last volume both containers take the same card, and each says that others cannot see that."""
    docker.write("/etc/tfgpu/tfgpu.toml", ONE_CARD)
    contest = Contest(docker, simulate("4x24GiB"))
    for name in "ab":
        contest.add(name, share_leases=False)
    contest.begin()
    for given in contest.read_all().values():
        assert list(given["gpus"]) == GPUS[:1]
        (finding,) = given["findings"]
        message = finding.partition("gpu.visible_devices: ")[2]
        assert f"{message} [warning private-leases]" in " ".join(MESSAGES.read_text().replace("> ", "").split())


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_doctor_tells_whether_leases_are_shared(docker: Docker, simulate: Simulate, share: bool, exists: bool) -> None:
    """A container with leases of its own is a problem where the policy takes leases, before the first one, too."""
    docker.write("/etc/tfgpu/tfgpu.toml", ONE_CARD)
    make = "mkdir -m 1777 -p /run/lock/tfgpu; " if exists else ""
    words = docker.make_command(
        ["sh", "-c", f"{make}python -m tfenv {' '.join(DOCTOR)}"], share_leases=share, gpus=simulate("4x24GiB")
    )
    done = docker(*words, check=False)
    rows = {row["topic"]: row for row in json.loads(done.stdout)["rows"]}
    assert ("leases" in rows) is not share, done.stdout
    if not share:
        assert rows["leases"]["verdict"] == "problem"
        assert "only this container sees the leases in /run/lock/tfgpu" in rows["leases"]["found"]


def test_a_directory_that_docker_made_is_not_shared_with_users(docker: Docker, simulate: Simulate) -> None:
    """Docker makes a missing directory for root alone. A user's leases are then in the container, and that is said."""
    docker.write("/etc/tfgpu/tfgpu.toml", ONE_CARD)
    (docker.host / "run" / "lock" / "tfgpu").rmdir()
    contest = Contest(docker, simulate("2x24GiB"))
    contest.add("a", "--user", "1000")
    contest.begin()
    (finding,) = contest.read("a")["findings"]
    assert "the leases in /tmp/tfgpu are seen in this container only" in finding
    assert "mode 1777" in finding


def test_a_policy_without_leases_needs_no_volume(docker: Docker, simulate: Simulate) -> None:
    """A container that takes no leases is not told to share them."""
    docker.write("/etc/tfgpu/tfgpu.toml", f"[gpu]\nvisible_devices = [1]\n{QUIET}")
    ask = ["python", "-m", "tfenv", *DOCTOR]
    done = docker(*docker.make_command(ask, share_leases=False, gpus=simulate("4x24GiB")), check=False)
    assert "leases" not in {row["topic"] for row in json.loads(done.stdout)["rows"]}


# ---- user namespaces


@pytest.fixture(scope="module")
def remapped_dockerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """A dockerd whose containers' root is the host's uid 300000, as its own view of /etc says."""
    etc = tmp_path_factory.mktemp("etc")
    for name in ("subuid", "subgid"):
        (etc / name).write_text("nobody:300000:65536\n")
    mounts = " && ".join(f"touch /etc/{name} && mount --bind {etc}/{name} /etc/{name}" for name in ("subuid", "subgid"))
    script = f'{mounts} && exec "$@"'
    unshare = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh")
    docker = start_docker("--userns-remap=nobody:nogroup", prefix=unshare)
    yield docker
    docker.close()


@pytest.fixture
def remapped(remapped_dockerd: Docker) -> Iterator[Docker]:
    remapped_dockerd.clear_host()
    yield remapped_dockerd
    remapped_dockerd.remove_all()


def test_containers_in_user_namespaces_agree(remapped: Docker, simulate: Simulate) -> None:
    """Root and a user of the containers, whom the host knows by other uids, take different cards."""
    remapped.write("/etc/tfgpu/tfgpu.toml", ONE_CARD)
    contest = Contest(remapped, simulate("4x24GiB"))
    for name, user in {"a": "0", "b": "1000"}.items():
        contest.add(name, "--user", user)
    contest.begin()
    given = contest.read_all()
    assert {each["uid"] for each in given.values()} == {0, 1000}
    assert len({gpu for each in given.values() for gpu in each["gpus"]}) == 2
    assert {lease.uid for lease in read_leases_of_host(remapped)} == {300000, 301000}


def test_the_hosts_root_is_no_user_in_a_user_namespace(remapped: Docker, simulate: Simulate) -> None:
    """The directory of leases belongs to the host's root, so doctor does not warn of its owner."""
    ask = ["python", "-m", "tfenv", *DOCTOR]
    done = remapped(*remapped.make_command(ask, gpus=simulate("4x24GiB")), check=False)
    assert "leases" not in {row["topic"] for row in json.loads(done.stdout)["rows"]}, done.stdout


def test_the_hosts_policy_counts_in_a_user_namespace(remapped: Docker, simulate: Simulate) -> None:
    """Nobody owns the host's /etc/tfgpu there, and it holds all the same, for users as the container counts them."""
    remapped.write("/etc/tfgpu/tfgpu.toml", read_policy_of_recipe())
    assert explain_limits(remapped, simulate, "--user", "0") == dict.fromkeys(GPUS[1:3], 12 * GIB)
    assert explain_limits(remapped, simulate, "--user", "1000") == dict.fromkeys(GPUS[1:3], 8 * GIB)


# ---- what else the recipe says


def read_policy_of_recipe() -> str:
    """Return the recipe's policy of the host, with simulated cards in it."""
    (block,) = [block for block in blocks("toml", pages=[RECIPE]) if block.text.startswith("# /etc/tfgpu/tfgpu.toml")]
    text = block.text.replace("GPU-8932f937", GPUS[1]).replace("GPU-5c1a0b7e", GPUS[2])
    assert text.count("GPU-a") == 2
    return text


@pytest.mark.parametrize("users", [_USERS, ""])
def test_a_uid_has_its_table_with_and_without_an_entry(docker: Docker, simulate: Simulate, users: str) -> None:
    """The table for uid:1000 holds for that user, whether or not the container's /etc/passwd names it."""
    docker.write("/etc/tfgpu/tfgpu.toml", read_policy_of_recipe())
    passwd = f"--volume={docker.write('/passwd', users)}:/etc/passwd:ro"
    assert explain_limits(docker, simulate, passwd, "--user", "0") == dict.fromkeys(GPUS[1:3], 12 * GIB)
    assert explain_limits(docker, simulate, passwd, "--user", "1000") == dict.fromkeys(GPUS[1:3], 8 * GIB)


def explain_limits(docker: Docker, simulate: Simulate, *options: str) -> dict[str, int]:
    """Return the bytes of each card that a program in a container may take, by UUID."""
    ask = ["python", "-m", "tfenv", "explain", "--format", "json"]
    explained = json.loads(docker(*docker.make_command(ask, *options, gpus=simulate("4x24GiB"))).stdout)
    assert explained["findings"] == []
    devices = explained["plan"]["devices"]
    return {gpu["uuid"]: gpu["limit_bytes"] or gpu["limit_fraction"] * gpu["total_bytes"] for gpu in devices}


def test_records_are_on_the_host(docker: Docker, simulate: Simulate) -> None:
    """Each uid has its own log in the host's folder, under the name that the container was given."""
    docker.write("/etc/tfgpu/tfgpu.toml", read_policy_of_recipe())
    contest = Contest(docker, simulate("4x24GiB"))
    for name, user in {"trainer-a": "0", "trainer-b": "1000"}.items():
        contest.add(name, "--user", user)
    contest.begin()
    for name, given in contest.run_to_the_end().items():
        assert list(given["gpus"]) == []  # the policy chooses nothing
        log = docker.host / "var" / "log" / "tfgpu" / f"{given['uid']}.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()]
        assert {record["host"] for record in records} == {name}


def test_records_go_to_docker_logs(docker: Docker, simulate: Simulate) -> None:
    """With `stderr = "json"` and `file = "none"` every record is in `docker logs`."""
    docker.write("/etc/tfgpu/tfgpu.toml", '[gpu]\nmemory_growth = true\n[audit]\nstderr = "json"\nfile = "none"\n')
    contest = Contest(docker, simulate("1x24GiB"))
    contest.add("a")
    contest.begin()
    contest.run_to_the_end()
    events = [json.loads(line)["event"] for line in contest.read_logs()["a"].splitlines()]
    assert "policy_loaded" in events


def test_records_go_to_the_hosts_syslog(docker: Docker, simulate: Simulate) -> None:
    """With `syslog = true` and the volume of the recipe the host's syslog has every record."""
    docker.write("/etc/tfgpu/tfgpu.toml", '[gpu]\nmemory_growth = true\n[audit]\nsyslog = true\nfile = "none"\n')
    (volume,) = re.findall(r"`--volume (\S+:/dev/log)`", " ".join(RECIPE.read_text().split()))
    place = docker.host / volume.partition(":")[0].lstrip("/")
    place.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(place))
        place.chmod(0o666)
        syslog.settimeout(PATIENCE)
        contest = Contest(docker, simulate("1x24GiB"))
        contest.add("a", f"--volume={docker.host}{volume}")
        contest.begin()
        assert b"policy_loaded" in syslog.recv(1 << 16)


def test_numbers_of_the_host_are_warned_of(docker: Docker, simulate: Simulate) -> None:
    """In a container with one card, the host's number 2 is no card, and `check` says to write UUIDs."""
    docker.write("/etc/tfgpu/tfgpu.toml", "[ceiling]\nallowed_devices = [2]\n")
    ask = ["python", "-m", "tfenv", "check", "--format", "json"]
    done = docker(*docker.make_command(ask, gpus=simulate("1x24GiB")), check=False)
    codes = [finding["code"] for finding in json.loads(done.stdout)["findings"]]
    assert codes == ["numbers-in-machine-layer", "no-such-device"], done.stdout


def test_compose_mounts_what_the_command_mounts() -> None:
    """The volumes of the recipe's Compose file are those of its command."""
    (block,) = [block for block in blocks("yaml", pages=[RECIPE]) if "services:" in block.text]
    yaml = pytest.importorskip("yaml", reason="of the development group")
    volumes = yaml.safe_load(block.text)["services"]["train"]["volumes"]
    words = shlex.split(find_command().text.replace("\\\n", " "))
    assert volumes == [value for _, value in pairs_after(words) if value is not None]


# ---- simulated machines, and TensorFlow


def test_a_shared_simulated_machine_serves_containers(docker: Docker) -> None:
    """Containers that mount the folder of a shared machine take different cards of it."""
    docker.write("/etc/tfgpu/tfgpu.toml", ONE_CARD)
    folder = docker.host / "lab"
    make = [sys.executable, "-m", "tfenv", "simulate", "--shared", str(folder), "--gpus", "4x24GiB", "--", "true"]
    subprocess.run(make, cwd=REPOSITORY, check=True, capture_output=True)
    contest = Contest(docker, gpus=None, rounds=5)
    simulate = ["python", "-m", "tfenv", "simulate", "--shared", str(folder), "--"]
    for name, user in {"a": "0", "b": "1000", "c": "1000", "d": "4711"}.items():
        contest.add(name, f"--volume={folder}:{folder}", "--user", user, share_leases=False, prefix=simulate)
    for number in range(contest.rounds):
        contest.begin(number)
        given = contest.read_all(number)
        assert sorted(gpu for each in given.values() for gpu in each["gpus"]) == GPUS
        contest.end(number)


TRAIN = """
import os, time
import tensorflow as tf
count, device = len(tf.config.list_logical_devices("GPU")), tf.zeros(1).device
print(os.environ["CUDA_VISIBLE_DEVICES"], count, device, flush=True)
time.sleep(600)
"""


def test_tensorflow_in_two_containers_takes_two_cards(docker: Docker, simulate: Simulate) -> None:
    """Two containers run the recipe's command. Real TensorFlow has one GPU in each, and they are different ones."""
    docker.write("/etc/tfgpu/tfgpu.toml", ONE_CARD.replace('stderr = "none"', ""))
    docker.write("/app/train.py", TRAIN)
    command = docker.make_command(
        ["python", "train.py"], f"--volume={docker.host}/app:/app:ro", "--env=TF_CPP_MIN_LOG_LEVEL=3",
        gpus=simulate("4x24GiB"),
    )  # fmt: skip
    started = [docker.start(name, command) for name in ("a", "b")]
    seen = {}
    for name in started:
        until = time.monotonic() + PATIENCE
        while not (found := docker("logs", name)).stdout:
            running = docker("inspect", "--format", "{{.State.Running}}", name).stdout.strip()
            assert (running, time.monotonic() < until) == ("true", True), found.stderr
            time.sleep(0.2)
        visible, count, device = found.stdout.split()
        seen[visible] = (count, device)
        assert f"tfgpu: TensorFlow on GPU {visible} of 4" in found.stderr
    assert sorted(seen) == ["0", "1"]
    assert set(seen.values()) == {("1", "/job:localhost/replica:0/task:0/device:GPU:0")}
