"""Which files are found, in which order, and which never are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

import pytest

from tfenv.config import discover as discover_module
from tfenv.config.discover import discover, list_candidate_paths
from tfenv.config.document import DocumentError, Trust, read
from tfenv.errors import Finding
from tfenv.policy.model import Source, Start, Subject

ME = os.getuid()
REPOSITORY = Path(__file__).parents[2]
ALICE = Subject("alice", 1000, ("students", "alice", "gpu-users"))
POLICY = "[gpu]\nmemory_growth = true\n"
PROJECT_FILES = ("tfgpu.toml", "pyproject.toml")
IN_PYPROJECT = "[tool.tfgpu.gpu]\nmemory_growth = true\n"


class World:
    """A machine in a folder: /etc/tfgpu, a home directory, a project below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.machine = root / "etc"
        self.home = root / "home"
        self.project = self.home / "work" / "project"
        self.project.mkdir(parents=True)
        self.machine.mkdir()

    def put(self, path: Path | str, text: str = POLICY) -> str:
        """Write a file below the root, with its directories; returns its path."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return str(target)

    def start(
        self,
        cwd: Path | None = None,
        *,
        script_dir: Path | None = None,
        config: str | None = None,
        run: str | None = None,
        elevated: bool = False,
        isolated: bool = False,
    ) -> Start:
        return Start(
            cwd=str(cwd or self.project),
            uid=ME,
            script_dir=None if script_dir is None else str(script_dir),
            config=config,
            run=run,
            home=str(self.home),
            config_home=str(self.home / ".config"),
            elevated=elevated,
            isolated=isolated,
        )

    def find(self, start: Start | None = None, subject: Subject = ALICE) -> tuple[Source, ...]:
        sources, findings = discover(start or self.start(), subject, str(self.machine))
        assert findings == ()
        return sources

    def paths(self, start: Start | None = None, subject: Subject = ALICE) -> list[str]:
        return [os.path.relpath(source.path, self.root) for source in self.find(start, subject)]

    def wrong(self, start: Start) -> Finding:
        sources, findings = discover(start, ALICE, str(self.machine))
        assert sources == ()
        (finding,) = findings
        return finding


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# ---- layers


def test_layers_come_from_the_least_specific_to_the_nearest(world: World) -> None:
    """Machine, user, project, run: each found once, in the order of the layers."""
    world.put("home/work/project/tfgpu.toml")
    world.put("home/.config/tfgpu/tfgpu.toml")
    world.put("etc/tfgpu.toml")
    sources = world.find(world.start(run='[gpu]\nmemory_limit = "1GiB"\n'))
    assert [source.layer for source in sources] == ["machine", "user", "project", "run"]
    assert sources[3].text == '[gpu]\nmemory_limit = "1GiB"\n'
    assert sources[3].path == "<tfgpu run>"


def test_nothing_there_is_nothing_found(world: World) -> None:
    """Without any file there is no source and no finding."""
    assert world.find() == ()


def test_the_machine_directory_is_literal() -> None:
    """Whatever the environment says, the administrator's directory is /etc/tfgpu."""
    assert discover_module.MACHINE_ROOT == "/etc/tfgpu"
    script = "import tfenv.config.discover as d; print(d.MACHINE_ROOT, d.discover.__defaults__)"
    moved = dict.fromkeys(("TFGPU_MACHINE", "TFGPU_ETC", "XDG_CONFIG_DIRS", "HOME", "TFGPU_CONFIG"), "/tmp/evil")
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY, env={**os.environ, **moved}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "/etc/tfgpu ('/etc/tfgpu',)\n"


# ---- machine


def test_machine_files_are_the_general_one_own_groups_by_name_and_own_user(world: World) -> None:
    """Only the caller's own groups and name count, groups sorted, each with its scope."""
    for name in ("tfgpu", "groups/students", "groups/gpu-users", "groups/staff", "users/alice", "users/bob"):
        world.put(f"etc/{name}.toml")
    sources = world.find()
    assert [os.path.relpath(source.path, world.machine) for source in sources] == [
        "tfgpu.toml", "groups/gpu-users.toml", "groups/students.toml", "users/alice.toml",
    ]  # fmt: skip
    assert [source.scope for source in sources] == [
        None, ("group", "gpu-users"), ("group", "students"), ("user", "alice"),
    ]  # fmt: skip
    assert {source.layer for source in sources} == {"machine"}


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "..", ".", ".hidden", "", "a/b", "nul\0", "x" * 300, "\ud800"]
)
def test_a_name_never_leads_out_of_its_folder(world: World, name: str) -> None:
    """Names with slashes, leading dots, or that no file can have are looked for nowhere."""
    for place in (
        "etc/evil.toml",
        "etc/.hidden.toml",
        "etc/groups/.hidden.toml",
        "etc/groups/.toml",
        "etc/users/a/b.toml",
    ):
        world.put(place)
    assert world.find(subject=Subject(name, 1000, (name,))) == ()


def test_a_user_without_a_name_has_a_file_too(world: World) -> None:
    """Where there is no passwd entry, users/uid:1234.toml is the user's."""
    world.put("etc/users/uid:1234.toml")
    assert world.paths(subject=Subject("uid:1234", 1234)) == ["etc/users/uid:1234.toml"]


def test_the_cost_does_not_grow_with_the_number_of_users(world: World) -> None:
    """A thousand more users' files mean not one call more into the operating system."""

    def calls() -> int:
        count = 0

        def profile(_frame: FrameType, event: str, _function: object) -> None:
            nonlocal count
            count += event == "c_call"

        sys.setprofile(profile)
        try:
            sources, _ = discover(Start(None, ME), ALICE, str(world.machine))
        finally:
            sys.setprofile(None)
        assert len(sources) == 1
        return count

    world.put("etc/users/alice.toml")
    before = calls()
    for number in range(1_000):
        world.put(f"etc/users/user{number}.toml")
        world.put(f"etc/groups/group{number}.toml")
    assert calls() == before > 0


@pytest.mark.skipif(ME != 0, reason="only root can become somebody else")
def test_a_locked_machine_directory_is_not_silence() -> None:
    """What may not be looked at is a source, so that reading it says "unreadable"; what is not there is none."""
    script = (
        "import os, sys\n"
        "from tfenv.config.discover import discover\n"
        "from tfenv.policy.model import Start, Subject\n"
        "os.setuid(65534)\n"
        "sources, _ = discover(Start(None, 65534), Subject('nobody', 65534), sys.argv[1])\n"
        "print([os.path.basename(source.path) for source in sources if source.scope is None])\n"
    )
    # Not in tmp_path, whose parents nobody else may enter.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        printed = []
        for mode in (0o755, 0o700):
            os.chmod(folder, mode)
            done = subprocess.run(
                [sys.executable, "-c", script, folder], cwd=REPOSITORY, capture_output=True, text=True, check=True
            )
            printed.append(done.stdout)
    assert printed == ["[]\n", "['tfgpu.toml']\n"]


# ---- the walk


def test_the_nearest_file_upward_is_the_project(world: World) -> None:
    """Of two files on the way up the nearer one is taken, and only that."""
    world.put("home/tfgpu.toml")
    world.put("home/work/tfgpu.toml")
    assert world.paths() == ["home/work/tfgpu.toml"]
    world.put("home/work/project/tfgpu.toml")
    assert world.paths() == ["home/work/project/tfgpu.toml"]


def test_tfgpu_toml_comes_before_pyproject_in_one_directory(world: World) -> None:
    """The own file wins over [tool.tfgpu] beside it, a nearer pyproject over a farther own file."""
    world.put("home/work/project/pyproject.toml", IN_PYPROJECT)
    world.put("home/work/tfgpu.toml")
    (source,) = world.find()
    assert source.path == str(world.project / "pyproject.toml")
    assert source.table == ("tool", "tfgpu")
    world.put("home/work/project/tfgpu.toml")
    assert world.paths() == ["home/work/project/tfgpu.toml"]


@pytest.mark.parametrize(
    "text",
    [
        "[project]\nname = 'x'\n",
        "[project]\nkeywords = ['tfgpu']\n",
        "[tool.other]\ntfgpu = 1\n",
        "this is not TOML at all [",
        "tool = 1 # tfgpu\n",
        "#" * (300 * 1024),
    ],
)
def test_a_pyproject_without_our_table_does_not_stop_the_walk(world: World, text: str) -> None:
    """One that is silent about us is passed by, and if it is broken that is none of our business."""
    world.put("home/work/project/pyproject.toml", text)
    world.put("home/work/tfgpu.toml")
    assert world.paths() == ["home/work/tfgpu.toml"]


@pytest.mark.parametrize("text", [IN_PYPROJECT + "broken = \n", "# tfgpu\n" + "#" * (300 * 1024)])
def test_a_pyproject_that_mentions_us_and_cannot_be_read_is_a_source(world: World, text: str) -> None:
    """It stops the walk, so that reading it says what is wrong."""
    world.put("home/work/project/pyproject.toml", text)
    world.put("home/work/tfgpu.toml")
    (source,) = world.find()
    with pytest.raises(DocumentError) as caught:
        read(source, Trust(ME))
    assert caught.value.finding.code in ("syntax", "too-large")


def test_a_pyproject_that_is_no_file_is_passed_by(world: World) -> None:
    """A FIFO, a directory, a dangling link named pyproject.toml neither hang nor stop the walk."""
    expected = os.path.relpath(world.put("home/work/tfgpu.toml"), world.root)
    path = world.project / "pyproject.toml"
    os.mkfifo(path)
    assert world.paths() == [expected]
    path.unlink()
    path.mkdir()
    assert world.paths() == [expected]
    path.rmdir()
    path.symlink_to("nowhere")
    assert world.paths() == [expected]


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "dangling", "loop"])
def test_whatever_is_named_tfgpu_toml_stops_the_walk(world: World, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something with our name is meant for us: it is a source, and reading it says what is wrong."""
    world.put("home/work/tfgpu.toml")
    path = world.project / "tfgpu.toml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        # The name of a socket has 108 characters at most.
        monkeypatch.chdir(world.project)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("tfgpu.toml")
    else:
        path.symlink_to("nowhere" if kind == "dangling" else path)
    (source,) = world.find()
    assert source.path == str(path)
    with pytest.raises(DocumentError):
        read(source, Trust(ME))


def test_the_walk_ends_at_home(world: World) -> None:
    """The home directory is looked into, what is above it never."""
    world.put("tfgpu.toml")
    assert world.find() == ()
    world.put("home/tfgpu.toml")
    assert world.paths() == ["home/tfgpu.toml"]


def test_the_walk_ends_at_a_home_that_is_a_link(world: World) -> None:
    """Home is recognised by what it is: the working directory has the real path, the passwd entry a link."""
    world.put("tfgpu.toml")
    (world.root / "link").symlink_to(world.home)
    start = Start(cwd=str(world.project), uid=ME, home=str(world.root / "link"))
    assert world.find(start) == ()


def test_outside_home_the_walk_goes_on_to_the_top(world: World) -> None:
    """A directory that is not below home has its parents looked at too."""
    world.put("tfgpu.toml")
    elsewhere = world.root / "srv" / "vision"
    elsewhere.mkdir(parents=True)
    assert world.paths(world.start(elsewhere)) == ["tfgpu.toml"]


def test_the_walk_ends_after_32_levels(world: World) -> None:
    """The 32nd directory from the bottom is looked into, the 33rd is not."""
    deep = world.project
    for _ in range(31):
        deep = deep / "d"
    (deep / "d").mkdir(parents=True)
    world.put("home/work/project/tfgpu.toml")
    assert world.paths(world.start(deep)) == ["home/work/project/tfgpu.toml"]
    assert world.find(world.start(deep / "d")) == ()


def test_the_walk_ends_at_a_file_system_boundary() -> None:
    """From /proc, a file system of its own, nothing above is looked into."""
    if os.stat("/proc").st_dev == os.stat("/").st_dev:
        pytest.skip("/proc is not mounted")
    looked = list(discover_module._list_upward("/proc/sys/kernel", None))
    assert looked == ["/proc/sys/kernel", "/proc/sys", "/proc"]


def test_the_directory_of_the_script_is_the_second_choice(world: World) -> None:
    """A cron job in / finds the policy beside its script; where both have one, the working directory's wins."""
    elsewhere = world.root / "cron"
    elsewhere.mkdir()
    world.put("home/work/tfgpu.toml")
    assert world.paths(world.start(elsewhere, script_dir=world.project)) == ["home/work/tfgpu.toml"]
    world.put("cron/tfgpu.toml")
    assert world.paths(world.start(elsewhere, script_dir=world.project)) == ["cron/tfgpu.toml"]


def test_a_deleted_working_directory_has_no_project(world: World) -> None:
    """Without a working directory, or with one that is gone, the project layer is left out without a word."""
    user = world.put("home/.config/tfgpu/tfgpu.toml")
    gone = world.root / "gone" / "below"
    assert world.paths(world.start(gone)) == [os.path.relpath(user, world.root)]
    start = Start(cwd=None, uid=ME, home=str(world.home), config_home=str(world.home / ".config"))
    assert world.paths(start) == [os.path.relpath(user, world.root)]


def test_a_process_whose_directory_was_deleted_finds_nothing_and_raises_nothing(tmp_path: Path) -> None:
    """A real process that deletes the directory it stands in."""
    script = (
        "import os, sys\n"
        "from tfenv.config.discover import discover\n"
        "from tfenv.policy.model import Start, Subject\n"
        "os.chdir(sys.argv[1])\n"
        "cwd = os.getcwd()\n"
        "os.rmdir(cwd)\n"
        "print(discover(Start(cwd, 0), Subject('a', 0), sys.argv[1] + '/none'))\n"
        "print(discover(Start(None, 0, config='x.toml'), Subject('a', 0), sys.argv[1] + '/none')[1][0].code)\n"
    )
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "gone")],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "((), ())\nnot-found\n"


def test_the_owner_of_the_start_directory_travels_with_user_and_project_files(world: World) -> None:
    """Whose directory the process started in is known to whoever judges the file."""
    world.put("home/tfgpu.toml")
    if ME == 0:
        os.chown(world.project, 65534, -1)
    (source,) = world.find()
    assert source.start_owner == world.project.stat().st_uid


# ---- TFGPU_CONFIG


def test_tfgpu_config_replaces_the_walk_and_never_the_machine_layer(world: World) -> None:
    """The named file is the project, whatever stands in the working directory; it is required."""
    world.put("etc/tfgpu.toml")
    world.put("home/work/project/tfgpu.toml")
    other = world.put("home/other.toml")
    sources = world.find(world.start(config=other))
    assert [(source.layer, source.path) for source in sources] == [
        ("machine", str(world.machine / "tfgpu.toml")),
        ("project", other),
    ]
    assert sources[1].required


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("mine.toml", "home/work/project/mine.toml"),
        ("../mine.toml", "home/work/project/../mine.toml"),
        ("~/mine.toml", "home/mine.toml"),
        ("sub~/mine.toml", "home/work/project/sub~/mine.toml"),
    ],
)
def test_tfgpu_config_is_relative_to_the_start_or_to_home(world: World, config: str, expected: str) -> None:
    """A relative path counts from the directory at start, `~` is the home of the passwd entry, not $HOME."""
    (source,) = world.find(world.start(config=config))
    assert source.path == f"{world.root}/{expected}"


def test_a_missing_tfgpu_config_is_a_finding(world: World) -> None:
    """A name that leads to nothing does not fall back to the walk: reading it says so."""
    world.put("home/work/project/tfgpu.toml")
    (source,) = world.find(world.start(config="missing.toml"))
    with pytest.raises(DocumentError) as caught:
        read(source, Trust(ME))
    assert caught.value.finding.code == "not-found"


def test_a_directory_in_tfgpu_config_names_the_file_that_would_be_right(world: World) -> None:
    """The finding says which file to name."""
    finding = world.wrong(world.start(config=str(world.home)))
    assert finding.code == "not-a-file"
    assert str(world.home / "tfgpu.toml") in finding.message


def test_a_tfgpu_config_that_cannot_be_followed_is_a_finding(world: World) -> None:
    """No home for `~`, no working directory for a relative path."""
    assert "home directory" in world.wrong(Start(cwd="/", uid=ME, config="~/x.toml")).message
    assert "working directory" in world.wrong(Start(cwd=None, uid=ME, config="x.toml")).message


def test_an_empty_tfgpu_config_is_an_unset_one(world: World) -> None:
    """As in shells, an empty variable means nothing."""
    world.put("home/work/project/tfgpu.toml")
    assert world.paths(world.start(config="")) == ["home/work/project/tfgpu.toml"]


def test_tfgpu_config_may_name_a_pyproject(world: World) -> None:
    """Then the policy is its [tool.tfgpu]."""
    world.put("home/pyproject.toml", IN_PYPROJECT)
    (source,) = world.find(world.start(config="~/pyproject.toml"))
    assert source.table == ("tool", "tfgpu")


# ---- the same file twice, and who counts when


def test_the_users_file_is_not_the_project_too(world: World) -> None:
    """Whoever works in ~/.config/tfgpu has the user layer once; the walk goes on above."""
    world.put("home/.config/tfgpu/tfgpu.toml")
    inside = world.home / ".config" / "tfgpu"
    assert [source.layer for source in world.find(world.start(inside))] == ["user"]
    assert [source.layer for source in world.find(world.start(inside, config="tfgpu.toml"))] == ["user"]
    world.put("home/tfgpu.toml")
    assert world.paths(world.start(inside)) == ["home/.config/tfgpu/tfgpu.toml", "home/tfgpu.toml"]


def test_the_machines_file_is_not_the_project_too(world: World) -> None:
    """An administrator who works in /etc/tfgpu, or links to it, has the machine layer once."""
    world.put("etc/tfgpu.toml")
    assert [source.layer for source in world.find(world.start(world.machine))] == ["machine"]
    (world.project / "tfgpu.toml").symlink_to(world.machine / "tfgpu.toml")
    assert [source.layer for source in world.find()] == ["machine"]


def everywhere(world: World) -> None:
    for path in ("etc/tfgpu.toml", "home/.config/tfgpu/tfgpu.toml", "home/work/project/tfgpu.toml", "home/other.toml"):
        world.put(path)


def test_under_sudo_only_the_machine_counts(world: World) -> None:
    """Neither files nor variables of the caller reach an elevated process."""
    everywhere(world)
    start = world.start(config="~/other.toml", run=POLICY, script_dir=world.project, elevated=True)
    assert [source.layer for source in world.find(start)] == ["machine"]


def test_an_isolated_interpreter_has_no_walk_and_no_variables(world: World) -> None:
    """`python -I` and `-E`: machine and user files only."""
    everywhere(world)
    start = world.start(config="~/other.toml", run=POLICY, script_dir=world.project, isolated=True)
    assert [source.layer for source in world.find(start)] == ["machine", "user"]


def places_of(world: World, start: Start) -> list[str]:
    return [os.path.relpath(path, world.root) for path in list_candidate_paths(start, ALICE, str(world.machine))]


def test_every_place_is_named_before_a_file_is_there(world: World) -> None:
    """`list_candidate_paths` names what `discover` would find: machine, user, and every level of the walk."""
    machine = ["etc/tfgpu.toml", *(f"etc/groups/{name}.toml" for name in sorted(ALICE.groups)), "etc/users/alice.toml"]
    user = "home/.config/tfgpu/tfgpu.toml"
    walk = [f"home/{folder}{name}" for folder in ("work/project/", "work/", "") for name in PROJECT_FILES]
    assert places_of(world, world.start()) == [*machine, user, *walk]
    assert places_of(world, world.start(config="~/other.toml")) == [*machine, user, "home/other.toml"]
    assert places_of(world, world.start(isolated=True)) == [*machine, user]
    assert places_of(world, world.start(elevated=True)) == machine
    other = world.start(world.home / "work", script_dir=world.project)
    assert sorted(places_of(world, other)) == sorted([*machine, user, *walk])


def test_what_is_found_is_among_the_places(world: World) -> None:
    """No file speaks that stands where nobody watches."""
    everywhere(world)
    for start in (world.start(), world.start(elevated=True), world.start(isolated=True)):
        assert {source.path for source in world.find(start)} <= set(
            list_candidate_paths(start, ALICE, str(world.machine))
        )


def test_a_relative_config_home_is_ignored(world: World) -> None:
    """The XDG specification calls relative paths invalid."""
    world.put("home/work/project/conf/tfgpu/tfgpu.toml")
    assert world.find(Start(cwd=None, uid=ME, home=str(world.home), config_home="conf")) == ()


def test_looking_opens_nothing_but_a_pyproject(world: World) -> None:
    """Files that were found stay closed until they are read (seen by the interpreter's audit events)."""
    everywhere(world)
    world.put("home/work/project/below/pyproject.toml", "[project]\n")
    script = (
        "import os, sys\n"
        "from tfenv.config.discover import discover\n"
        "from tfenv.policy.model import Start, Subject\n"
        "root = sys.argv[1]\n"
        "sys.addaudithook(lambda event, args: print(args[0]) if event == 'open' else None)\n"
        "start = Start(root + '/home/work/project/below', 0, home=root + '/home', config_home=root + '/home/.config')\n"
        "assert len(discover(start, Subject('a', 0), root + '/etc')[0]) == 3\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(world.root)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(world.project / "below" / "pyproject.toml")]
