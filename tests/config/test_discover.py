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

from tfenv.config import presence
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


class MachineTree:
    """A machine in a folder: /etc/tfgpu, a home directory, a project below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.etc = root / "etc"
        self.home = root / "home"
        self.project = self.home / "work" / "project"
        self.project.mkdir(parents=True)
        self.etc.mkdir()

    def write(self, path: Path | str, text: str = POLICY) -> str:
        """Write a file below the root, with its directories. Return its path."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return str(target)

    def make_start(
        self,
        cwd: Path | None = None,
        *,
        script_dir: Path | None = None,
        site: str | None = None,
        config: str | None = None,
        run: str | None = None,
        elevated: bool = False,
        isolated: bool = False,
    ) -> Start:
        return Start(
            cwd=str(cwd or self.project),
            uid=ME,
            program_folders=() if script_dir is None else (str(script_dir),),
            site=site,
            config=config,
            run=run,
            home=str(self.home),
            config_home=str(self.home / ".config"),
            elevated=elevated,
            isolated=isolated,
        )

    def find(self, start: Start | None = None, subject: Subject = ALICE) -> tuple[Source, ...]:
        sources, findings = discover(start or self.make_start(), subject, str(self.etc))
        assert findings == ()
        return sources

    def find_paths(self, start: Start | None = None, subject: Subject = ALICE) -> list[str]:
        return [os.path.relpath(source.path, self.root) for source in self.find(start, subject)]

    def find_mistake(self, start: Start) -> Finding:
        sources, findings = discover(start, ALICE, str(self.etc))
        assert sources == ()
        (finding,) = findings
        return finding


@pytest.fixture
def tree(tmp_path: Path) -> MachineTree:
    return MachineTree(tmp_path)


# ---- layers


def test_layers_come_from_the_least_specific_to_the_nearest(tree: MachineTree) -> None:
    """Machine, site, user, project, run: each found once, in the order of the layers."""
    tree.write("home/work/project/tfgpu.toml")
    tree.write("home/.config/tfgpu/tfgpu.toml")
    tree.write("etc/tfgpu.toml")
    site = tree.write("opt/tfgpu.toml")
    sources = tree.find(tree.make_start(site=site, run='[gpu]\nmemory_limit = "1GiB"\n'))
    assert [source.layer for source in sources] == ["machine", "site", "user", "project", "run"]
    assert sources[4].text == '[gpu]\nmemory_limit = "1GiB"\n'
    assert sources[4].path == "<tfgpu run>"


def test_nothing_there_is_nothing_found(tree: MachineTree) -> None:
    """Without any file there is no source and no finding."""
    assert tree.find() == ()


def test_the_machine_directory_is_literal() -> None:
    """Whatever the environment says, the administrator's directory is /etc/tfgpu."""
    assert presence.MACHINE_ROOT == "/etc/tfgpu"
    script = "import tfenv.config.discover as d; print(d.MACHINE_ROOT, d.discover.__defaults__[0])"
    moved = dict.fromkeys(("TFGPU_MACHINE", "TFGPU_ETC", "XDG_CONFIG_DIRS", "HOME", "TFGPU_CONFIG"), "/tmp/evil")
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY, env={**os.environ, **moved}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "/etc/tfgpu /etc/tfgpu\n"


# ---- machine


def test_machine_files_are_the_general_one_own_groups_by_name_and_own_user(tree: MachineTree) -> None:
    """Only the caller's own groups and name count, groups sorted, each with its scope."""
    for name in ("tfgpu", "groups/students", "groups/gpu-users", "groups/staff", "users/alice", "users/bob"):
        tree.write(f"etc/{name}.toml")
    sources = tree.find()
    assert [os.path.relpath(source.path, tree.etc) for source in sources] == [
        "tfgpu.toml", "groups/gpu-users.toml", "groups/students.toml", "users/alice.toml",
    ]  # fmt: skip
    assert [source.scope for source in sources] == [
        None, ("group", "gpu-users"), ("group", "students"), ("user", "alice"),
    ]  # fmt: skip
    assert {source.layer for source in sources} == {"machine"}


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "..", ".", ".hidden", "", "a/b", "nul\0", "x" * 300, "\ud800"]
)
def test_a_name_never_leads_out_of_its_folder(tree: MachineTree, name: str) -> None:
    """Names with slashes, leading dots, or that no file can have are looked for nowhere."""
    for place in (
        "etc/evil.toml",
        "etc/.hidden.toml",
        "etc/groups/.hidden.toml",
        "etc/groups/.toml",
        "etc/users/a/b.toml",
    ):
        tree.write(place)
    assert tree.find(subject=Subject(name, 1000, (name,))) == ()


def test_a_user_without_a_name_has_a_file_too(tree: MachineTree) -> None:
    """Where there is no passwd entry, users/uid:1234.toml is the user's."""
    tree.write("etc/users/uid:1234.toml")
    assert tree.find_paths(subject=Subject("uid:1234", 1234)) == ["etc/users/uid:1234.toml"]


def test_the_cost_does_not_grow_with_the_number_of_users(tree: MachineTree) -> None:
    """A thousand more users' files mean not one call more into the operating system."""

    def count_calls() -> int:
        total = 0

        def count(_frame: FrameType, event: str, _function: object) -> None:
            nonlocal total
            total += event == "c_call"

        sys.setprofile(count)
        try:
            sources, _ = discover(Start(None, ME), ALICE, str(tree.etc))
        finally:
            sys.setprofile(None)
        assert len(sources) == 1
        return total

    tree.write("etc/users/alice.toml")
    before = count_calls()
    for number in range(1_000):
        tree.write(f"etc/users/user{number}.toml")
        tree.write(f"etc/groups/group{number}.toml")
    assert count_calls() == before > 0


@pytest.mark.skipif(ME != 0, reason="only root can become somebody else")
def test_a_locked_machine_directory_is_not_silence() -> None:
    """What may not be looked at is a source, so that reading it says "unreadable". What is not there is none."""
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


def test_the_nearest_file_upward_is_the_project(tree: MachineTree) -> None:
    """Of two files on the way up the nearer one is taken, and only that."""
    tree.write("home/tfgpu.toml")
    tree.write("home/work/tfgpu.toml")
    assert tree.find_paths() == ["home/work/tfgpu.toml"]
    tree.write("home/work/project/tfgpu.toml")
    assert tree.find_paths() == ["home/work/project/tfgpu.toml"]


def test_tfgpu_toml_comes_before_pyproject_in_one_directory(tree: MachineTree) -> None:
    """The own file wins over [tool.tfgpu] beside it, a nearer pyproject over a farther own file."""
    tree.write("home/work/project/pyproject.toml", IN_PYPROJECT)
    tree.write("home/work/tfgpu.toml")
    (source,) = tree.find()
    assert source.path == str(tree.project / "pyproject.toml")
    assert source.table == ("tool", "tfgpu")
    tree.write("home/work/project/tfgpu.toml")
    assert tree.find_paths() == ["home/work/project/tfgpu.toml"]


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
def test_a_pyproject_without_our_table_does_not_stop_the_walk(tree: MachineTree, text: str) -> None:
    """One that is silent about us is passed by, and if it is broken that is none of our business."""
    tree.write("home/work/project/pyproject.toml", text)
    tree.write("home/work/tfgpu.toml")
    assert tree.find_paths() == ["home/work/tfgpu.toml"]


@pytest.mark.parametrize("text", [IN_PYPROJECT + "broken = \n", "# tfgpu\n" + "#" * (300 * 1024)])
def test_a_pyproject_that_mentions_us_and_cannot_be_read_is_a_source(tree: MachineTree, text: str) -> None:
    """It stops the walk, so that reading it says what is wrong."""
    tree.write("home/work/project/pyproject.toml", text)
    tree.write("home/work/tfgpu.toml")
    (source,) = tree.find()
    with pytest.raises(DocumentError) as caught:
        read(source, Trust(ME))
    assert caught.value.finding.code in ("syntax", "too-large")


def test_a_pyproject_that_is_no_file_is_passed_by(tree: MachineTree) -> None:
    """A FIFO, a directory, a dangling link named pyproject.toml neither hang nor stop the walk."""
    expected = os.path.relpath(tree.write("home/work/tfgpu.toml"), tree.root)
    path = tree.project / "pyproject.toml"
    os.mkfifo(path)
    assert tree.find_paths() == [expected]
    path.unlink()
    path.mkdir()
    assert tree.find_paths() == [expected]
    path.rmdir()
    path.symlink_to("nowhere")
    assert tree.find_paths() == [expected]


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "dangling", "loop"])
def test_whatever_is_named_tfgpu_toml_stops_the_walk(
    tree: MachineTree, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something with our name is meant for us: it is a source, and reading it says what is wrong."""
    tree.write("home/work/tfgpu.toml")
    path = tree.project / "tfgpu.toml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        # The name of a socket has 108 characters at most.
        monkeypatch.chdir(tree.project)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("tfgpu.toml")
    else:
        path.symlink_to("nowhere" if kind == "dangling" else path)
    (source,) = tree.find()
    assert source.path == str(path)
    with pytest.raises(DocumentError):
        read(source, Trust(ME))


def test_the_walk_ends_at_home(tree: MachineTree) -> None:
    """The home directory is looked into, what is above it never."""
    tree.write("tfgpu.toml")
    assert tree.find() == ()
    tree.write("home/tfgpu.toml")
    assert tree.find_paths() == ["home/tfgpu.toml"]


def test_the_walk_ends_at_a_home_that_is_a_link(tree: MachineTree) -> None:
    """Home is recognised by what it is: the working directory has the real path, the passwd entry a link."""
    tree.write("tfgpu.toml")
    (tree.root / "link").symlink_to(tree.home)
    start = Start(cwd=str(tree.project), uid=ME, home=str(tree.root / "link"))
    assert tree.find(start) == ()


def test_outside_home_the_walk_goes_on_to_the_top(tree: MachineTree) -> None:
    """A directory that is not below home has its parents looked at too."""
    tree.write("tfgpu.toml")
    elsewhere = tree.root / "srv" / "vision"
    elsewhere.mkdir(parents=True)
    assert tree.find_paths(tree.make_start(elsewhere)) == ["tfgpu.toml"]


def test_the_walk_ends_after_32_levels(tree: MachineTree) -> None:
    """The 32nd directory from the bottom is looked into, the 33rd is not."""
    deep = tree.project
    for _ in range(31):
        deep = deep / "d"
    (deep / "d").mkdir(parents=True)
    tree.write("home/work/project/tfgpu.toml")
    assert tree.find_paths(tree.make_start(deep)) == ["home/work/project/tfgpu.toml"]
    assert tree.find(tree.make_start(deep / "d")) == ()


def test_the_walk_ends_at_a_file_system_boundary() -> None:
    """From /proc, a file system of its own, nothing above is looked into."""
    if os.stat("/proc").st_dev == os.stat("/").st_dev:
        pytest.skip("/proc is not mounted")
    looked = list(presence.list_upward("/proc/sys/kernel", None))
    assert looked == ["/proc/sys/kernel", "/proc/sys", "/proc"]


def test_the_directory_of_the_script_is_the_second_choice(tree: MachineTree) -> None:
    """A cron job in / finds the policy beside its script. Where both have one, the working directory's wins."""
    elsewhere = tree.root / "cron"
    elsewhere.mkdir()
    tree.write("home/work/tfgpu.toml")
    assert tree.find_paths(tree.make_start(elsewhere, script_dir=tree.project)) == ["home/work/tfgpu.toml"]
    tree.write("cron/tfgpu.toml")
    assert tree.find_paths(tree.make_start(elsewhere, script_dir=tree.project)) == ["cron/tfgpu.toml"]


def test_a_deleted_working_directory_has_no_project(tree: MachineTree) -> None:
    """Without a working directory, or with one that is gone, the project layer is left out without a word."""
    user = tree.write("home/.config/tfgpu/tfgpu.toml")
    gone = tree.root / "gone" / "below"
    assert tree.find_paths(tree.make_start(gone)) == [os.path.relpath(user, tree.root)]
    start = Start(cwd=None, uid=ME, home=str(tree.home), config_home=str(tree.home / ".config"))
    assert tree.find_paths(start) == [os.path.relpath(user, tree.root)]


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


def test_the_owner_of_the_start_directory_travels_with_user_and_project_files(tree: MachineTree) -> None:
    """Whose directory the process started in is known to whoever judges the file."""
    tree.write("home/tfgpu.toml")
    if ME == 0:
        os.chown(tree.project, 65534, -1)
    (source,) = tree.find()
    assert source.start_owner == tree.project.stat().st_uid


# ---- TFGPU_CONFIG


def test_tfgpu_config_replaces_the_walk_and_never_the_machine_layer(tree: MachineTree) -> None:
    """The named file is the project, whatever stands in the working directory. It is required."""
    tree.write("etc/tfgpu.toml")
    tree.write("home/work/project/tfgpu.toml")
    other = tree.write("home/other.toml")
    sources = tree.find(tree.make_start(config=other))
    assert [(source.layer, source.path) for source in sources] == [
        ("machine", str(tree.etc / "tfgpu.toml")),
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
def test_tfgpu_config_is_relative_to_the_start_or_to_home(tree: MachineTree, config: str, expected: str) -> None:
    """A relative path counts from the directory at start, `~` is the home of the passwd entry, not $HOME."""
    (source,) = tree.find(tree.make_start(config=config))
    assert source.path == f"{tree.root}/{expected}"


def test_a_missing_tfgpu_config_is_a_finding(tree: MachineTree) -> None:
    """A name that leads to nothing does not fall back to the walk: reading it says so."""
    tree.write("home/work/project/tfgpu.toml")
    (source,) = tree.find(tree.make_start(config="missing.toml"))
    with pytest.raises(DocumentError) as caught:
        read(source, Trust(ME))
    assert caught.value.finding.code == "not-found"


def test_a_directory_in_tfgpu_config_names_the_file_that_would_be_right(tree: MachineTree) -> None:
    """The finding says which file to name."""
    finding = tree.find_mistake(tree.make_start(config=str(tree.home)))
    assert finding.code == "not-a-file"
    assert str(tree.home / "tfgpu.toml") in finding.message


def test_a_tfgpu_config_that_cannot_be_followed_is_a_finding(tree: MachineTree) -> None:
    """No home for `~`, no working directory for a relative path."""
    assert "home directory" in tree.find_mistake(Start(cwd="/", uid=ME, config="~/x.toml")).message
    assert "working directory" in tree.find_mistake(Start(cwd=None, uid=ME, config="x.toml")).message


def test_an_empty_tfgpu_config_is_an_unset_one(tree: MachineTree) -> None:
    """As in shells, an empty variable means nothing."""
    tree.write("home/work/project/tfgpu.toml")
    assert tree.find_paths(tree.make_start(config="")) == ["home/work/project/tfgpu.toml"]


def test_tfgpu_config_may_name_a_pyproject(tree: MachineTree) -> None:
    """Then the policy is its [tool.tfgpu]."""
    tree.write("home/pyproject.toml", IN_PYPROJECT)
    (source,) = tree.find(tree.make_start(config="~/pyproject.toml"))
    assert source.table == ("tool", "tfgpu")


# ---- TFGPU_SITE_CONFIG


def test_the_sites_file_replaces_no_other(tree: MachineTree) -> None:
    """The file of TFGPU_SITE_CONFIG is required, and the walk or TFGPU_CONFIG finds the project's file as ever."""
    tree.write("home/work/project/tfgpu.toml")
    site, other = tree.write("opt/site.toml"), tree.write("home/other.toml")
    walked = tree.find(tree.make_start(site=site))
    named = tree.find(tree.make_start(site=site, config=other))
    assert [(source.layer, source.path, source.required) for source in walked] == [
        ("site", site, True), ("project", str(tree.project / "tfgpu.toml"), False),
    ]  # fmt: skip
    assert [(source.layer, source.path, source.required) for source in named] == [
        ("site", site, True), ("project", other, True),
    ]  # fmt: skip


def test_the_owner_of_the_start_directory_speaks_for_no_site(tree: MachineTree) -> None:
    """A relative TFGPU_SITE_CONFIG in a stranger's directory must not take that stranger's file."""
    tree.write("home/work/project/site.toml")
    (source,) = tree.find(tree.make_start(site="site.toml"))
    assert source.start_owner is None


@pytest.mark.parametrize(
    ("site", "expected"),
    [("mine.toml", "home/work/project/mine.toml"), ("~/mine.toml", "home/mine.toml")],
)
def test_a_sites_path_is_relative_to_the_start_or_to_home(tree: MachineTree, site: str, expected: str) -> None:
    """A relative path counts from the directory at start, `~` is the home of the passwd entry."""
    (source,) = tree.find(tree.make_start(site=site))
    assert source.path == f"{tree.root}/{expected}"


def test_a_site_that_names_no_file_is_a_finding_with_the_variables_name(tree: MachineTree) -> None:
    """A directory, and a path that counts from nowhere, are said with what to write."""
    assert tree.find_mistake(tree.make_start(site=str(tree.home))).message.startswith("TFGPU_SITE_CONFIG names a direc")
    finding = tree.find_mistake(Start(cwd="/", uid=ME, site="~/x.toml"))
    assert finding.code == "not-found"
    assert finding.message.startswith("TFGPU_SITE_CONFIG is relative to the home directory")
    assert tree.find(tree.make_start(site="")) == ()


@pytest.mark.parametrize(("path", "layer"), [("etc/tfgpu.toml", "machine"), ("home/.config/tfgpu/tfgpu.toml", "user")])
def test_a_site_that_is_another_layers_file_counts_once(tree: MachineTree, path: str, layer: str) -> None:
    """The machine's file and the user's stay what they are, also where a link leads to them."""
    tree.write(path)
    (tree.root / "link.toml").symlink_to(tree.root / path)
    for site in (tree.root / path, tree.root / "link.toml"):
        assert [source.layer for source in tree.find(tree.make_start(site=str(site)))] == [layer]


@pytest.mark.parametrize("name", PROJECT_FILES)
def test_the_sites_file_is_not_the_project_too(tree: MachineTree, name: str) -> None:
    """Whoever works beside the site's file has it once. The walk goes on above, and TFGPU_CONFIG adds nothing."""
    site = tree.write(f"home/work/project/{name}", IN_PYPROJECT if name == "pyproject.toml" else POLICY)
    tree.write("home/tfgpu.toml")
    assert tree.find_paths(tree.make_start(site=site)) == [f"home/work/project/{name}", "home/tfgpu.toml"]
    assert [source.layer for source in tree.find(tree.make_start(site=site, config=site))] == ["site"]


# ---- the same file twice, and who counts when


def test_the_users_file_is_not_the_project_too(tree: MachineTree) -> None:
    """Whoever works in ~/.config/tfgpu has the user layer once. The walk goes on above."""
    tree.write("home/.config/tfgpu/tfgpu.toml")
    inside = tree.home / ".config" / "tfgpu"
    assert [source.layer for source in tree.find(tree.make_start(inside))] == ["user"]
    assert [source.layer for source in tree.find(tree.make_start(inside, config="tfgpu.toml"))] == ["user"]
    tree.write("home/tfgpu.toml")
    assert tree.find_paths(tree.make_start(inside)) == ["home/.config/tfgpu/tfgpu.toml", "home/tfgpu.toml"]


def test_the_machines_file_is_not_the_project_too(tree: MachineTree) -> None:
    """An administrator who works in /etc/tfgpu, or links to it, has the machine layer once."""
    tree.write("etc/tfgpu.toml")
    assert [source.layer for source in tree.find(tree.make_start(tree.etc))] == ["machine"]
    (tree.project / "tfgpu.toml").symlink_to(tree.etc / "tfgpu.toml")
    assert [source.layer for source in tree.find()] == ["machine"]


def write_everywhere(tree: MachineTree) -> None:
    for path in ("etc/tfgpu.toml", "home/.config/tfgpu/tfgpu.toml", "home/work/project/tfgpu.toml", "home/other.toml"):
        tree.write(path)


def test_under_sudo_only_the_machine_counts(tree: MachineTree) -> None:
    """Neither files nor variables of the caller reach an elevated process."""
    write_everywhere(tree)
    start = tree.make_start(
        site="~/other.toml", config="~/other.toml", run=POLICY, script_dir=tree.project, elevated=True
    )
    assert [source.layer for source in tree.find(start)] == ["machine"]


def test_an_isolated_interpreter_has_no_walk_and_no_variables(tree: MachineTree) -> None:
    """`python -I` and `-E`: machine and user files only."""
    write_everywhere(tree)
    start = tree.make_start(
        site="~/other.toml", config="~/other.toml", run=POLICY, script_dir=tree.project, isolated=True
    )
    assert [source.layer for source in tree.find(start)] == ["machine", "user"]


def list_places(tree: MachineTree, start: Start) -> list[str]:
    return [os.path.relpath(path, tree.root) for path in list_candidate_paths(start, ALICE, str(tree.etc))]


def test_every_place_is_named_before_a_file_is_there(tree: MachineTree) -> None:
    """`list_candidate_paths` names what `discover` would find: machine, user, and every level of the walk."""
    machine = ["etc/tfgpu.toml", *(f"etc/groups/{name}.toml" for name in sorted(ALICE.groups)), "etc/users/alice.toml"]
    user = "home/.config/tfgpu/tfgpu.toml"
    walk = [f"home/{folder}{name}" for folder in ("work/project/", "work/", "") for name in PROJECT_FILES]
    assert list_places(tree, tree.make_start()) == [*machine, user, *walk]
    assert list_places(tree, tree.make_start(config="~/other.toml")) == [*machine, user, "home/other.toml"]
    assert list_places(tree, tree.make_start(site="~/site.toml")) == [*machine, user, "home/site.toml", *walk]
    assert list_places(tree, tree.make_start(site="~/site.toml", isolated=True)) == [*machine, user]
    assert list_places(tree, tree.make_start(site="~/site.toml", elevated=True)) == machine
    other = tree.make_start(tree.home / "work", script_dir=tree.project)
    assert sorted(list_places(tree, other)) == sorted([*machine, user, *walk])


def test_what_is_found_is_among_the_places(tree: MachineTree) -> None:
    """No file speaks that stands where nobody watches."""
    write_everywhere(tree)
    for start in (tree.make_start(), tree.make_start(elevated=True), tree.make_start(isolated=True)):
        assert {source.path for source in tree.find(start)} <= set(list_candidate_paths(start, ALICE, str(tree.etc)))


def test_a_relative_config_home_is_ignored(tree: MachineTree) -> None:
    """The XDG specification calls relative paths invalid."""
    tree.write("home/work/project/conf/tfgpu/tfgpu.toml")
    assert tree.find(Start(cwd=None, uid=ME, home=str(tree.home), config_home="conf")) == ()


def test_looking_opens_nothing_but_a_pyproject(tree: MachineTree) -> None:
    """Files that were found stay closed until they are read (seen by the interpreter's audit events)."""
    write_everywhere(tree)
    tree.write("home/work/project/below/pyproject.toml", "[project]\n")
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
        [sys.executable, "-c", script, str(tree.root)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(tree.project / "below" / "pyproject.toml")]
