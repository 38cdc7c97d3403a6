"""The pages cannot lie: what they show is parsed, checked, and where it can be, run through the pipeline."""

from __future__ import annotations

import configparser
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli

from tests.machine import ME, Machine
from tests.pages import DOCS, PAGES, ROOT, Block, Command, all_commands, blocks, commands, file_name
from tfenv import pipeline
from tfenv.audit.stderr_line import format_policy_line
from tfenv.cli.main import COMMANDS, make_parser
from tfenv.config.discover import PYPROJECT_TABLE
from tfenv.config.document import Document, Trust
from tfenv.config.schema import validate
from tfenv.launchers.grant import read_grant
from tfenv.launchers.parent import split_tokens
from tfenv.lint.combinations import advise
from tfenv.policy.model import (
    DEFAULT_OVERHEAD,
    Allocation,
    Device,
    Inventory,
    LayerName,
    Lease,
    Plan,
    Source,
    Start,
    Subject,
)
from tfenv.sharing.allocate import describe_request
from tfenv.sharing.choose import choose_gpus
from tfenv.sharing.occupancy import Occupancy, describe_occupancy
from tfenv.sharing.request import request_from_plan
from tfenv.values import replace

yaml: Any = pytest.importorskip("yaml", reason="of the development group")

GIB = 1 << 30

# ---- the machine of the worked examples

UUIDS = ("8932f937", "5c1a0b7e", "e4d0a6c2", "0f7be913", "a1c4d2e8", "6b90f3a7", "d27e5c14", "39f8b06d")
GROUPS = {"alice": ("students",), "bob": ("staff",), "carol": ("students",)}
YOU = "you"
UIDS = {YOU: 1000, "alice": 1001, "bob": 1002, "carol": 1003}


def cards(count: int, name: str, total: int) -> Inventory:
    uuids = [f"GPU-{start}-0000-4000-8000-000000000000" for start in UUIDS[:count]]
    return Inventory(tuple(Device(index, uuid, name, total) for index, uuid in enumerate(uuids)))


#: The day on which the examples are read: tables with an end have not come to it.
TODAY = "2026-12-01"
#: Four cards as on the page of the laws, unless a page says eight.
FOUR = cards(4, "NVIDIA A100-SXM4-40GB", 40 * GIB)
EIGHT = cards(8, "NVIDIA A100-SXM4-80GB", 80 * GIB)
MACHINES = {"administrators.md": EIGHT}


class Example:
    """The files of one section, laid out below a temporary folder, and the commands that are run there."""

    def __init__(self, section: tuple[Block, ...], root: Path) -> None:
        self.root = root
        self.machine = Machine(root)
        self.inventory = MACHINES.get(section[0].page.name, FOUR)
        for block in section:
            if block.language == "toml":
                self.machine.write(self._inside(file_name(block)), self._moved(block.text))
        self.leases: list[Lease] = []
        self.request = _request("".join(block.text for block in section if block.language == "python"))

    def _inside(self, name: str) -> str:
        """Where a file of the page stands below the temporary folder."""
        if name.startswith("/etc/tfgpu/"):
            return name.replace("/etc/tfgpu/", "etc/")
        if name.startswith("~/"):
            return name.replace("~/", "home/")
        return name.lstrip("/") if name.startswith("/") else f"home/project/{name}"

    def _moved(self, text: str) -> str:
        return text.replace("/srv/", f"{self.root}/srv/")

    def outcome(self, command: Command) -> list[str]:
        """The line on stderr, and what `tfgpu explain` says of settings that were clamped."""
        user = command.user or YOU
        grant, _ = read_grant(command.variables, command.variables, "")
        places = {self.machine.etc: "/etc/tfgpu", self.root / "home": f"/home/{user}", self.root / "srv": "/srv"}
        loaded = renamed(self._load(command, user), {str(place): name for place, name in places.items()})
        plan = pipeline.decide(loaded, grant, self.inventory, self.request).plan
        if plan.takes_leases:
            allocations = self._take_seats(command, plan)
            if isinstance(allocations, str):
                return [allocations]
            plan = pipeline.decide(loaded, grant, self.inventory, self.request, allocations=allocations).plan
        clamps = [
            f"    clamped: {finding.message}"
            for finding in plan.findings
            if finding.code == "clamped" and "gpu" in (finding.key or "").split(".")
        ]
        line = format_policy_line(loaded.subject, loaded.policy, plan, findings=loaded.findings, title="TensorFlow")
        return [line, *clamps]

    def _take_seats(self, command: Command, plan: Plan) -> tuple[Allocation, ...] | str:
        """The places the program takes beside those of the section that run already, or what it says while it waits."""
        user = command.user or YOU
        gpu_request = request_from_plan(plan, UIDS[user], overhead=DEFAULT_OVERHEAD)
        assert gpu_request is not None
        scene = Occupancy(tuple(self.leases))
        allocations = choose_gpus(gpu_request, scene)
        if allocations is None:
            names = {device.device.uuid: device.token for device in plan.devices or () if device.device is not None}
            awaited, occupancy = describe_request(gpu_request), describe_occupancy(scene, names)
            return f"tfgpu: waiting for {awaited} (0:12): {occupancy} [waiting]"
        if command.background:
            pid = 4101 + len(self.leases)
            self.leases += [
                Lease(str(pid), allocation, UIDS[user], user, pid, command.words[-1], overhead=DEFAULT_OVERHEAD)
                for allocation in allocations
            ]
        return allocations

    def _load(self, command: Command, user: str) -> pipeline.LoadedPolicy:
        folder = self.root / command.folder.lstrip("/") if command.folder else self.machine.project
        folder.mkdir(parents=True, exist_ok=True)
        site, config = (command.variables.get(name) for name in ("TFGPU_SITE_CONFIG", "TFGPU_CONFIG"))
        start = Start(
            cwd=str(folder),
            uid=ME,
            site=self._moved(site) if site else None,
            config=self._moved(config) if config else None,
            home=str(self.root / "home"),
            config_home=str(self.root / "home" / ".config"),
        )
        trust = Trust(ME, administrator=ME, checked_from=str(self.root))
        return pipeline.load(start, Subject(user, ME, GROUPS.get(user, ())), str(self.machine.etc), trust, TODAY)


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The value with other paths in all its strings: messages are as long as those that people see."""
    if isinstance(value, str):
        for place, name in names.items():
            value = value.replace(place, name)
        return value
    if isinstance(value, Mapping):
        return {renamed(key, names): renamed(item, names) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(renamed(item, names) for item in value)
    if hasattr(type(value), "__match_args__"):
        return replace(value, **{name: renamed(getattr(value, name), names) for name in type(value).__match_args__})
    return value


def _request(program: str) -> tuple[str, ...] | None:
    """What the program of the section writes into CUDA_VISIBLE_DEVICES."""
    found = re.search(r'os\.environ\["CUDA_VISIBLE_DEVICES"\] = "(.*)"', program)
    return split_tokens(found[1]) if found else None


#: What they show is of several processes at once: tests/engines runs it with the real launcher.
RUN_BY_ENGINES = ("dask.md", "mpi.md", "ray.md")


def worked_examples() -> list[tuple[Block, ...]]:
    """The sections that show what a program says, each with its policies, or those that were shown last on its page."""
    sections: dict[tuple[Path, str], list[Block]] = {}
    for block in blocks(pages=[page for page in DOCS if page.name not in RUN_BY_ENGINES]):
        sections.setdefault((block.page, block.section), []).append(block)
    last: dict[Path, list[Block]] = {}
    found: list[tuple[Block, ...]] = []
    for (page, _), section in sections.items():
        own = [block for block in section if block.language == "toml"]
        before = [] if own else last.get(page, [])
        last[page] = own or before
        if last[page] and any(map(is_worked, section)):
            found.append((*section, *before))
    return found


def is_worked(block: Block) -> bool:
    return block.language == "console" and any(said(command) for command in commands(block.text))


def said(command: Command) -> list[str]:
    """What the page says that tfgpu says. Simulated GPUs are not here, but in tests/test_quickstart.py."""
    if command.words[:2] == ("tfgpu", "simulate"):
        return []
    return [line for line in command.output if line.startswith(("tfgpu: ", "    clamped: "))]


@pytest.mark.parametrize("section", worked_examples(), ids=lambda section: f"{section[0]} {section[0].section}")
def test_worked_examples_are_true(section: tuple[Block, ...], tmp_path: Path) -> None:
    """With the files of a section, a program of that user, under those variables, says what the page says."""
    example = Example(section, tmp_path)
    shown = [command for block in section if block.language == "console" for command in commands(block.text)]
    for command in shown:
        if command.words[0] in ("python", "tfgpu") and said(command):
            expected = example.outcome(command)
            if command.words[0] == "tfgpu":  # `tfgpu explain | grep clamped`
                assert said(command) == expected[1:]
            else:
                assert said(command) == expected[:1]


def test_there_are_worked_examples() -> None:
    """Both laws are shown with many examples, and other pages have some."""
    pages = [section[0].page.name for section in worked_examples()]
    assert pages.count("laws.md") >= 12
    assert {"laws.md", "sharing.md", "quickstart.md", "administrators.md", "slurm.md"} <= set(pages)


def test_a_wrong_example_is_noticed(tmp_path: Path) -> None:
    """The limit in the line is that of the file, not that of the page."""
    page = tmp_path / "page.md"
    policy = Block(page, 1, "toml", '# tfgpu.toml\n[gpu]\nmemory_limit = "8GiB"\n', "")
    (command,) = commands("$ python train.py\ntfgpu: all GPUs, at most 9.0 GiB each (tfgpu.toml)\n")
    (line,) = Example((policy,), tmp_path / "root").outcome(command)
    assert said(command) != [line]
    assert line.endswith("at most 8.0 GiB each (tfgpu.toml)")


# ---- policies

#: What is advised on every machine where these people are not known, a group is empty, or no syslog listens.
TOLERATED = {"unknown-user", "unknown-group", "empty-group", "no-syslog"}


def shown_policies() -> list[Block]:
    # What a page shows of tests is run in tests/policy_tests.
    return [block for block in blocks("toml") if not file_name(block).endswith(".test.toml")]


def read_policy(block: Block) -> Document:
    """A block as the file its first line names."""
    name = file_name(block)
    data: dict[str, Any] = tomli.loads(block.text)
    if name == "pyproject.toml":
        for table in PYPROJECT_TABLE:
            data = data[table]
    return Document(_source(name), data, "0" * 64, block.text, 0)


def _source(name: str) -> Source:
    folder, _, file = name.rpartition("/")
    if folder == "/etc/tfgpu/groups":
        return Source("machine", name, scope=("group", file.removesuffix(".toml")))
    if folder == "/etc/tfgpu/users":
        return Source("machine", name, scope=("user", file.removesuffix(".toml")))
    layer: LayerName = "machine" if folder == "/etc/tfgpu" else "user" if name.startswith("~/") else "project"
    return Source(layer, name)


@pytest.mark.parametrize("block", shown_policies(), ids=str)
def test_policies_are_right(block: Block) -> None:
    """A policy that a page shows names its file, gives no finding there, and no advice that could be followed here."""
    assert file_name(block).endswith(".toml"), "the first line says which file it is: # tfgpu.toml"
    title = block.text.partition("\n")[0]
    layer, findings = validate(read_policy(block), TODAY)
    assert (findings != ()) is title.endswith(", with a mistake")
    if findings:
        return
    advice = {finding.code for finding in advise([layer], today=TODAY)} - TOLERATED
    assert advice == ({"numbers-in-machine-layer"} if title.endswith(", with numbers") else set())


def machine_layers() -> list[tuple[Block, ...]]:
    """The sections that show several files of the machine layer, as they would stand in /etc/tfgpu."""
    found: dict[tuple[Path, str], list[Block]] = {}
    for block in shown_policies():
        if file_name(block).startswith("/etc/tfgpu/"):
            found.setdefault((block.page, block.section), []).append(block)
    return [tuple(section) for section in found.values() if len(section) > 1]


@pytest.mark.parametrize("section", machine_layers(), ids=lambda section: str(section[0]))
def test_machine_layers_are_right(section: tuple[Block, ...]) -> None:
    """Together, too, they give no advice that could be followed here: no table that never counts, no lost setting."""
    documents = [read_policy(block) for block in section]
    layers = [validate(document, TODAY)[0] for document in documents]
    # Nor are their projects' directories here.
    advice = [
        finding
        for finding in advise(layers, documents, today=TODAY)
        if not (finding.key or "").startswith('project."/srv/')
    ]
    assert {finding.code for finding in advice} <= TOLERATED


# ---- command lines and scripts


def shown_commands() -> list[tuple[str, Command]]:
    return [(page, command) for page, command in all_commands() if command.words[:1]]


def tfgpu_commands() -> list[Any]:
    found = [(page, list(c.words[1:])) for page, c in shown_commands() if Path(c.words[0]).name == "tfgpu"]
    return [pytest.param(words, id=f"{page} {' '.join(words)}") for page, words in found]


@pytest.mark.parametrize("words", tfgpu_commands())
def test_commands_are_understood(words: list[str]) -> None:
    """Every `tfgpu` command line of a page is one that the command itself can parse."""
    if words == ["COMMAND", "--help"]:
        return
    assert words[0] in COMMANDS
    parser = make_parser(words[:1])
    assert parser.parse_args(words) is not None


@pytest.mark.parametrize("block", blocks("bash", "sh"), ids=str)
def test_scripts_are_shell(block: Block) -> None:
    """A shell script of a page is one to a shell."""
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_are_shell(page: Path) -> None:
    """So is every line at a prompt."""
    text = page.read_text(encoding="utf-8")
    typed = re.findall(r"^(?: {4})?(?:[a-z]+@\S+)?\$ (.+(?:\\\n.+)*)$", text, re.MULTILINE)
    lines = [line for line in typed if "…" not in line]
    done = subprocess.run(["bash", "-n"], input="\n".join(lines), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    """Python of a page is Python."""
    compile(block.text, str(block), "exec")


# ---- other formats


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_yaml(block: Block) -> None:
    """A YAML block is well-formed, and no document of it is empty."""
    assert all(yaml.safe_load_all(block.text))


@pytest.mark.parametrize("block", blocks("ini"), ids=str)
def test_units_are_units(block: Block) -> None:
    """A unit of systemd has its sections, and keys in all of them."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(block.text)
    assert parser.sections()
    assert all(parser[section] for section in parser.sections())


INSTRUCTIONS = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "ENTRYPOINT", "CMD", "ARG", "VOLUME", "LABEL"}


@pytest.mark.parametrize("block", blocks("dockerfile"), ids=str)
def test_dockerfiles_are_dockerfiles(block: Block) -> None:
    """Each instruction is one, and what is run is shell."""
    lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= INSTRUCTIONS
    scripts = "\n".join(line.removeprefix("RUN ") for line in lines if line.startswith("RUN "))
    done = subprocess.run(["bash", "-n"], input=scripts, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
