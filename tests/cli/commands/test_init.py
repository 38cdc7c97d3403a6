"""`tfgpu init` writes a first policy and takes nobody's away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli

from tests.cli.conftest import REPOSITORY, Tfgpu
from tests.shared_machine import ALICE, ROOT, SharedMachine
from tfenv import __version__
from tfenv.api import check
from tfenv.config.schema import load_schema
from tfenv.config.schema_copy import flatten_schema
from tfenv.simulate.environment import build_environment, parse_gpus

#: What `tfgpu init` finds on a machine, and what it writes about it. Every text stands in the file.
MACHINES: dict[str, tuple[Any, ...]] = {
    "24GiB": (
        {},
        "# `tfgpu init` found one GPU: Simulated GPU, 24.0 GiB.\n",
        '# Two processes with this limit fit on a GPU of 24.0 GiB.\n# memory_limit = "11GiB"\n',
    ),
    "4x24GiB:NVIDIA A10": (
        {"count": 1, "when_busy": "share"},
        "# `tfgpu init` found 4 GPUs: NVIDIA A10, 24.0 GiB each.\n",
        '# memory_limit = "11GiB"\n',
    ),
    "2x24GiB:NVIDIA A10,80GiB:NVIDIA H100 PCIe": (
        {"count": 1, "when_busy": "share"},
        "#   GPU-a0fa4e00  NVIDIA A10, 24.0 GiB\n#   GPU-a1fa4e00  NVIDIA A10, 24.0 GiB\n",
        '# memory_limit = "45%"\n',
        '# match = "name:NVIDIA H100 PCIe"\n# memory_limit = "39GiB"\n',
    ),
    "10x24GiB:NVIDIA A10,4x80GiB:NVIDIA H100": (
        {"count": 1, "when_busy": "share"},
        "#   10 x NVIDIA A10, 24.0 GiB\n#   4 x NVIDIA H100, 80.0 GiB\n",
    ),
    "16GiB:NVIDIA T4,32GiB:NVIDIA T4": (
        {"count": 1, "when_busy": "share"},
        '# match = "GPU-a1fa4e00"\n',
    ),
    "80GiB/mig=1x40GiB+2x20GiB:NVIDIA A100": (
        {"count": 1, "when_busy": "share"},
        "# `tfgpu init` found 3 MIG instances:\n#   MIG-a0104e00-",
        '# match = "name:NVIDIA A100 MIG 3g.40gb"\n# memory_limit = "19GiB"\n',
    ),
}


@pytest.fixture
def no_gpus(tmp_path: Path) -> dict[str, str]:
    """Return variables under which NVML cannot be loaded, as on a machine without a driver."""
    folder = tmp_path / "no-driver"
    folder.mkdir()
    (folder / "libnvidia-ml.so.1").write_text("")
    return {"LD_LIBRARY_PATH": str(folder)}


def simulate(gpus: str) -> dict[str, str]:
    return build_environment(parse_gpus(gpus), base={})


def test_what_it_writes_is_right(project: Path, tfgpu: Tfgpu, no_gpus: dict[str, str]) -> None:
    """Without GPUs the file declares growth and nothing else. It has no finding, and the next steps are shown."""
    result = tfgpu("init", env=no_gpus)
    assert result.returncode == 0
    assert result.stdout.startswith("Wrote tfgpu.toml, and tfgpu.schema.json beside it for editors\n\nNext:\n")
    assert result.stdout in (REPOSITORY / "docs" / "quickstart.md").read_text()
    path = project / "tfgpu.toml"
    assert check(path) == ()
    assert tomli.loads(path.read_text())["gpu"] == {"memory_growth": True}
    assert sorted(os.listdir(project)) == ["tfgpu.schema.json", "tfgpu.toml"]


@pytest.mark.parametrize("gpus", MACHINES)
def test_it_fits_the_gpus(gpus: str, project: Path, tfgpu: Tfgpu) -> None:
    """The file names the GPUs that are here, takes a free one of several, and proposes a limit that two can share."""
    choice, *texts = MACHINES[gpus]
    cards = simulate(gpus)
    assert tfgpu("init", env=cards).returncode == 0
    text = (project / "tfgpu.toml").read_text()
    assert [part for part in texts if part not in text] == []
    assert tomli.loads(text)["gpu"] == {"memory_growth": True} | ({"visible_devices": choice} if choice else {})
    assert tfgpu("check", env=cards).stdout == "ok: tfgpu.toml\n"
    assert len(text.splitlines()) < 50
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("gpus", ["none", *MACHINES])
def test_every_comment_may_be_uncommented(gpus: str, project: Path, tfgpu: Tfgpu, no_gpus: dict[str, str]) -> None:
    """All the values in comments are right when they are uncommented together, on the machine they were written for."""
    cards = no_gpus if gpus == "none" else simulate(gpus)
    tfgpu("init", env=cards)
    path = project / "tfgpu.toml"
    path.write_text(uncomment(path.read_text()))
    policy = tomli.loads(path.read_text())
    several = gpus == "none" or bool(MACHINES[gpus][0])
    assert set(policy["gpu"]) >= {"memory_growth", "memory_limit"} | ({"visible_devices"} if several else set())
    assert set(policy["ceiling"]) == {"memory_limit"}
    assert tfgpu("check", env=cards).stdout == "ok: tfgpu.toml\n"


def test_two_programs_with_the_proposed_limit_share_a_gpu(project: Path, tfgpu: Tfgpu) -> None:
    """Two of them and what each takes beside its limit fit into the card, and 2 GiB more would not."""
    for size in (6, 24, 80):
        cards = simulate(f"{size}GiB")
        tfgpu("init", "--force", env=cards)
        path = project / "tfgpu.toml"
        path.write_text(uncomment(path.read_text()))
        limit = json.loads(tfgpu("explain", "--format", "json", env=cards).stdout)["plan"]["devices"][0]["limit_bytes"]
        assert size - 2 <= 2 * (limit / 2**30 + 600 / 1024) <= size


def test_the_policy_in_force_is_respected(server: SharedMachine) -> None:
    """A file on a machine with a policy says what that allows, and proposes no more."""
    env = simulate("8x80GiB:NVIDIA H100")
    policy = server.path("/etc/tfgpu/tfgpu.toml")
    policy.write_text(
        '[ceiling]\nallowed_devices = [0, 1, 2, 3]\nmax_devices = 2\nmemory_limit = "12GiB"\n'
        "[gpu]\nvisible_devices = {count = 1}\n"
    )
    assert server.tfgpu("init", user=ALICE, cwd="/home/alice", env=env).returncode == 0
    text = server.path("/home/alice/tfgpu.toml").read_text()
    assert (
        "# /etc/tfgpu/tfgpu.toml already applies here: 4 of 8 GPUs, max_devices = 2, at most 12.0 GiB of a GPU.\n"
    ) in text
    assert "# `tfgpu init` found 4 GPUs: NVIDIA H100, 80.0 GiB each.\n" in text
    assert "# /etc/tfgpu/tfgpu.toml already chooses for you." in text
    assert '# memory_limit = "12GiB"\n' in text
    assert tomli.loads(text)["gpu"] == {"memory_growth": True}
    policy.write_text('[ceiling]\nallowed_devices = "none"\n')
    assert server.tfgpu("init", "--force", user=ALICE, cwd="/home/alice", env=env).returncode == 0
    text = server.path("/home/alice/tfgpu.toml").read_text()
    assert "# The policy that applies here allows no GPU. Run `tfgpu explain` to see why.\n" in text


def test_the_sites_file_is_in_force_for_a_new_project(project: Path, tmp_path: Path, tfgpu: Tfgpu) -> None:
    """What a site allows is said in the project's first file, as what machine and user allow."""
    site = tmp_path / "site.toml"
    site.write_text('[ceiling]\nmemory_limit = "4GiB"\n')
    tfgpu("init", env=simulate("4x24GiB") | {"TFGPU_SITE_CONFIG": str(site)})
    text = (project / "tfgpu.toml").read_text()
    assert f"# {site} already applies here: at most 4.0 GiB of a GPU.\n" in text


def test_the_file_that_is_replaced_does_not_count(project: Path, tmp_path: Path, tfgpu: Tfgpu) -> None:
    """A user's own file is in force for projects, and not when it is itself written again."""
    own = tmp_path / "config" / "tfgpu"
    own.mkdir(parents=True)
    (own / "tfgpu.toml").write_text('[ceiling]\nmemory_limit = "4GiB"\n')
    cards = simulate("24GiB")
    tfgpu("init", env=cards)
    text = (project / "tfgpu.toml").read_text()
    assert f"# {own}/tfgpu.toml already applies here: at most 4.0 GiB of a GPU.\n" in text
    assert '# memory_limit = "4GiB"\n' in text
    tfgpu("init", "--force", "--path", own, env=cards)
    text = (own / "tfgpu.toml").read_text()
    assert "already applies" not in text
    assert '# memory_limit = "11GiB"\n' in text


# ---- the schema beside it


def test_its_schema_is_found_by_every_colleague(project: Path, tmp_path: Path, tfgpu: Tfgpu) -> None:
    """The first line names a copy beside the file, so it is right wherever the two files are checked out."""
    tfgpu("init")
    colleague = tmp_path / "colleague"
    project.rename(colleague)
    marker, _, schema = (colleague / "tfgpu.toml").read_text().splitlines()[0].partition(" ")
    assert (marker, schema) == ("#:schema", "./tfgpu.schema.json")
    copied = json.loads((colleague / schema).read_text())
    assert copied["$id"] == load_schema()["$id"]
    assert f"tfenv {__version__}" in copied["$comment"]
    assert str(REPOSITORY) not in (colleague / "tfgpu.toml").read_text() + (colleague / schema).read_text()


def test_a_file_of_somebody_elses_is_not_replaced_by_the_schema(project: Path, tfgpu: Tfgpu) -> None:
    """A file that has the name of the copy and is not ours stays, also with --force, and no policy is written."""
    other = project / "tfgpu.schema.json"
    for text in ("{}", "not JSON", '{"$id": "https://example.org/other"}'):
        other.write_text(text)
        for arguments in (("init",), ("init", "--force"), ("init", "--schema")):
            refused = tfgpu(*arguments)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert refused.stderr == (
                "tfgpu init: tfgpu.schema.json is not a schema that tfenv wrote; rename it and try again\n"
            )
        assert other.read_text() == text
        assert os.listdir(project) == ["tfgpu.schema.json"]
    other.unlink()
    other.symlink_to("elsewhere.json")
    assert tfgpu("init").returncode == 1
    assert not (project / "elsewhere.json").exists()


def test_an_old_schema_is_noted_and_refreshed(project: Path, tfgpu: Tfgpu) -> None:
    """After an upgrade `tfgpu check` notes that the copy is old, exits with 0, and `init --schema` writes it again."""
    tfgpu("init")
    policy, path = (project / "tfgpu.toml").read_text(), project / "tfgpu.schema.json"
    current = path.read_text()
    path.write_text(current.replace("memory_growth", "growth").replace(f"tfenv {__version__}", "tfenv 0.0.9"))
    noted = tfgpu("check")
    assert noted.returncode == 0
    assert noted.stdout.startswith(
        "tfgpu.toml:1:1: the schema ./tfgpu.schema.json is older than this tfenv; run `tfgpu init --schema` to "
        "refresh it [note schema-outdated]\n"
    )
    refreshed = tfgpu("init", "--schema")
    assert (refreshed.returncode, refreshed.stderr) == (0, "")
    assert refreshed.stdout.startswith("Wrote tfgpu.schema.json. Begin tfgpu.toml with this line:\n")
    assert tfgpu("init", "--schema").stdout.startswith("tfgpu.schema.json is up to date. ")
    assert path.read_text() == current
    assert (project / "tfgpu.toml").read_text() == policy
    assert tfgpu("check").stdout == "ok: tfgpu.toml\n"


def test_a_newer_schema_stays(project: Path, tfgpu: Tfgpu) -> None:
    """The copy of a colleague who has a later tfenv is neither noted nor replaced."""
    tfgpu("init")
    path = project / "tfgpu.schema.json"
    newer = path.read_text().replace("memory_growth", "growth").replace(f"tfenv {__version__}", "tfenv 99.0")
    path.write_text(newer)
    assert tfgpu("check").stdout == "ok: tfgpu.toml\n"
    for option in ("--schema", "--force"):
        assert tfgpu("init", option).returncode == 0
        assert path.read_text() == newer


def test_a_schema_line_that_leads_nowhere_is_noted(project: Path, tfgpu: Tfgpu) -> None:
    """A path into an environment that is gone is a note, with what to write. An address is none of our business."""
    path = project / "tfgpu.toml"
    path.write_text("# GPUs\n#:schema /opt/gone/tfgpu.schema.json\n[gpu]\nmemory_growth = true\n")
    noted = tfgpu("check")
    assert noted.returncode == 0
    assert noted.stdout.startswith(
        "tfgpu.toml:2:1: the schema /opt/gone/tfgpu.schema.json is not there, so editors cannot check this file; run "
        "`tfgpu init --schema` and write `#:schema ./tfgpu.schema.json` [note schema-missing]\n"
    )
    path.write_text("#:schema https://example.org/tfgpu.json\n[gpu]\nmemory_growth = true\n")
    assert tfgpu("check").stdout == "ok: tfgpu.toml\n"


def test_nothing_is_overwritten_unasked(project: Path, tfgpu: Tfgpu) -> None:
    """A tfgpu.toml that is there stays as it is, with 1 and a word on --force, which replaces it."""
    path = project / "tfgpu.toml"
    path.write_text("# mine\n")
    refused = tfgpu("init")
    assert (refused.returncode, path.read_text()) == (1, "# mine\n")
    assert "--force" in refused.stderr
    assert tfgpu("init", "--force").returncode == 0
    assert path.read_text().startswith("#:schema")


def test_a_dangling_link_counts_as_there(project: Path, tfgpu: Tfgpu) -> None:
    """A symbolic link that leads nowhere is not written through."""
    (project / "tfgpu.toml").symlink_to(project / "elsewhere.toml")
    assert tfgpu("init").returncode == 1
    assert not (project / "elsewhere.toml").exists()


def test_a_policy_in_pyproject_is_not_shadowed(project: Path, tfgpu: Tfgpu) -> None:
    """Where pyproject.toml holds the policy, a second file would silently replace it: refused without --force."""
    pyproject = project / "pyproject.toml"
    pyproject.write_text("[project]\nname = 'x'\n")
    assert tfgpu("init").returncode == 0
    (project / "tfgpu.toml").unlink()
    pyproject.write_text("[tool.tfgpu.gpu]\nmemory_growth = true\n")
    refused = tfgpu("init")
    assert refused.returncode == 1
    assert "pyproject.toml" in refused.stderr
    assert not (project / "tfgpu.toml").exists()


def test_another_directory(project: Path, tfgpu: Tfgpu) -> None:
    """--path names the project's root. One that does not exist is wrong usage."""
    (project / "inner").mkdir()
    assert tfgpu("init", "--path", "inner").returncode == 0
    assert (project / "inner" / "tfgpu.toml").is_file()
    assert tfgpu("init", "--path", "nowhere").returncode == 2


# ---- the machine's


def uncomment(text: str) -> str:
    """Return the file with all values in force that stand in comments."""
    return re.sub(r'^# *(\[.*\]$|\]$|"(?:GPU|MIG)-|[a-z_]+ = )', r"\1", text, flags=re.MULTILINE)


def list_keys(schema: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """List the keys of tables in a schema without references. Names that people choose are "*"."""
    named = (("*", entry) for entry in schema.get("patternProperties", {}).values())
    for name, entry in (*schema.get("properties", {}).items(), *named):
        yield (*path, name)
        yield from list_keys(entry.get("items", entry), (*path, name))


def list_offered(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """List the keys of a policy. Names that people choose are "*"."""
    for key, value in table.items():
        place = (*path, "*" if path in (("user",), ("group",), ("project",)) else key)
        yield place
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            yield from list_offered(entry, place) if isinstance(entry, dict) else ()


def test_a_draft_names_the_machines_gpus(project: Path, tfgpu: Tfgpu) -> None:
    """With NVML the UUIDs of all cards stand in the file, with name and memory. Nothing is wrong with it."""
    cards = build_environment(parse_gpus("2x24GiB:NVIDIA A10,1x80GiB:NVIDIA A100"), base={})
    result = tfgpu("init", "--machine", "--path", "etc", env=cards)
    assert (result.returncode, result.stderr) == (0, "")
    path = project / "etc" / "tfgpu.toml"
    text = path.read_text()
    assert len(re.findall(r'"GPU-[0-9a-f-]{36}",  # [012]: NVIDIA A10', text)) == 3
    assert "# 2: NVIDIA A100, 80.0 GiB" in text
    for target in ("etc", "etc/tfgpu.toml"):
        beside = ", etc/tfgpu.test.toml" if target == "etc" else ""
        assert tfgpu("check", target, env=cards).stdout == f"ok: etc/tfgpu.toml{beside}\n"
    assert tomli.loads(text)["gpu"] == {"memory_growth": True}
    assert tomli.loads(text)["ceiling"] == {}


@pytest.mark.parametrize("gpus", ["8x24GiB", "2x24GiB:NVIDIA A10,80GiB:NVIDIA A100", "80GiB/mig=2x40GiB", "none"])
def test_every_comment_of_it_may_be_uncommented(
    gpus: str, project: Path, tmp_path: Path, tfgpu: Tfgpu, no_gpus: dict[str, str]
) -> None:
    """All the values in comments are right together, on the machine they were written for."""
    cards = no_gpus if gpus == "none" else simulate(gpus)
    tfgpu("init", "--machine", "--path", "etc", env=cards)
    path = project / "etc" / "tfgpu.toml"
    text = uncomment(path.read_text())
    for name, right in {"students": "root", "alice": "root", "deploy": "root", "/srv/inference": str(tmp_path)}.items():
        text = text.replace(name, right)
    path.write_text(text)
    policy = tomli.loads(path.read_text())
    assert len(policy["ceiling"]["allowed_devices"]) == {"8x24GiB": 8, "none": 1, "80GiB/mig=2x40GiB": 2}.get(gpus, 3)
    assert policy["group"]["root"]["ceiling"] == {"memory_limit": "25%"}
    assert tfgpu("check", "etc", env=cards).stdout == "ok: etc/tfgpu.toml, etc/tfgpu.test.toml\n"


def test_a_machines_policy_offers_every_key(project: Path, tfgpu: Tfgpu) -> None:
    """Every key of every table is in the file, in force or in a comment, and so is each of the guide's table."""
    tfgpu("init", "--machine", "--path", "etc")
    offered = set(list_offered(tomli.loads(uncomment((project / "etc" / "tfgpu.toml").read_text()))))
    keys = set(list_keys(flatten_schema(load_schema())))
    # [user.NAME], [group.NAME] and [project."PATH"] have the keys of [gpu] and [ceiling]. One of each is shown.
    tables = {key for key in keys if len(key) > 1 and key[0] in ("user", "group", "project")}
    # [observe] has the tables of the top of the file once more.
    tables |= {key for key in keys if len(key) > 1 and key[0] == "observe"} - {("observe", "tell")}
    assert keys - tables - offered == set()
    assert {(table, "*") for table in ("user", "group", "project")} <= offered
    assert {("user", "*", "expires"), ("user", "*", "reason"), ("observe", "ceiling", "memory_limit")} <= offered
    guide = (REPOSITORY / "docs" / "administrators.md").read_text().partition("## Decide")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)(?: = [^`]*)?`", guide))
    assert len(named) >= 10
    assert named <= {key[-1] for key in offered}


@pytest.mark.parametrize("gpus", ["none", "8x24GiB", "2x81559MiB:NVIDIA A10,80GiB:H", "80GiB/mig=2x40GiB,24GiB"])
def test_its_tests_pass(gpus: str, project: Path, tfgpu: Tfgpu, no_gpus: dict[str, str]) -> None:
    """The first tests describe this machine, show a user, a group and an exception, and pass as they are."""
    cards = no_gpus if gpus == "none" else simulate(gpus)
    tfgpu("init", "--machine", "--path", "etc", env=cards)
    text = (project / "etc" / "tfgpu.test.toml").read_text()
    assert text.startswith("#:schema ./tfgpu-test.schema.json\n")
    assert all(len(line) <= 120 for line in text.splitlines())
    done = tfgpu("test", "etc", "-v")
    assert done.stdout.splitlines()[-1] == "3 passed"
    cases = tomli.loads(text)["case"]
    assert [set(case) - {"name", "expect"} for case in cases] == [set(), {"user", "groups"}, {"user", "groups"}]
    described = tomli.loads(text)["defaults"]
    assert ("uuids" in described) is (gpus != "none")


def test_its_tests_stay(project: Path, tfgpu: Tfgpu) -> None:
    """--force replaces the policy, not the tests that people wrote for it. Their schema is refreshed with the other."""
    tfgpu("init", "--machine", "--path", "etc")
    tests, schema = project / "etc" / "tfgpu.test.toml", project / "etc" / "tfgpu-test.schema.json"
    tests.write_text("# mine\n")
    schema.write_text(schema.read_text().replace("devices", "gpus_").replace(f"tfenv {__version__}", "tfenv 0.0.9"))
    assert tfgpu("init", "--machine", "--path", "etc", "--force").returncode == 0
    assert tests.read_text() == "# mine\n"
    schema.unlink()
    assert tfgpu("init", "--schema", "--path", "etc").returncode == 0
    assert schema.is_file()


def test_without_nvml_it_says_so(project: Path, tfgpu: Tfgpu, no_gpus: dict[str, str]) -> None:
    """Without a driver the file and the terminal say that no GPU is named and how to get the UUIDs."""
    result = tfgpu("init", "--machine", "--path", "etc", env=no_gpus)
    text = (project / "etc" / "tfgpu.toml").read_text()
    assert result.returncode == 0
    assert result.stderr.startswith("tfgpu init: the file names no GPU: NVML")
    assert "# The GPUs of this machine are not known: NVML" in text
    assert "nvidia-smi -L" in text


def test_a_draft_is_readable_by_all_whatever_the_umask(project: Path, variables: dict[str, str]) -> None:
    """Only the owner may write to it and everybody may read it: otherwise it would not count, or not for all."""
    for umask in (0o077, 0o002):
        folder = project / f"{umask:o}"
        command = [sys.executable, "-m", "tfenv", "init", "--machine", "--path", str(folder)]
        subprocess.run(command, env=variables, umask=umask, capture_output=True, check=True)
        files = ["tfgpu-test.schema.json", "tfgpu.schema.json", "tfgpu.test.toml", "tfgpu.toml"]
        assert [path.stat().st_mode & 0o777 for path in (folder, folder / "users")] == [0o755, 0o755]
        assert [(folder / name).stat().st_mode & 0o777 for name in files] == [0o644] * 4
        assert sorted(os.listdir(folder)) == sorted(["groups", "users", *files])


def test_a_draft_replaces_nothing_unasked(project: Path, tfgpu: Tfgpu) -> None:
    """What is there stays, be it a link that leads nowhere. --force replaces it."""
    (project / "etc").mkdir()
    path = project / "etc" / "tfgpu.toml"
    path.symlink_to(project / "elsewhere.toml")
    refused = tfgpu("init", "--machine", "--path", "etc")
    assert (refused.returncode, refused.stderr) == (
        1,
        "tfgpu init: etc/tfgpu.toml already exists; use --force to replace it\n",
    )
    assert tfgpu("init", "--machine", "--path", "etc", "--force").returncode == 0
    assert path.read_text().startswith("#:schema")
    assert not path.is_symlink()
    assert not (project / "elsewhere.toml").exists()


def test_a_draft_needs_a_place(project: Path, tfgpu: Tfgpu) -> None:
    """A folder whose parent is missing, and a file in its place, are wrong usage."""
    (project / "file").touch()
    for path in ("no/where", "file"):
        refused = tfgpu("init", "--machine", "--path", path)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "is not a directory" in refused.stderr


def test_the_machines_own(server: SharedMachine) -> None:
    """As root it writes /etc/tfgpu/tfgpu.toml, which counts for all at once, and replaces it only with --force."""
    server.path("/etc/tfgpu").rmdir()
    env = build_environment(parse_gpus("8x24GiB"), base={})
    written = server.tfgpu("init", "--machine", env=env)
    assert (written.returncode, written.stderr) == (0, "")
    path = server.path("/etc/tfgpu/tfgpu.toml")
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o644)
    checked = server.tfgpu("check", "/etc/tfgpu", env=env)
    assert checked.stdout == "ok: /etc/tfgpu/tfgpu.toml, /etc/tfgpu/tfgpu.test.toml\n"
    told = server.tfgpu("explain", "--user", "alice", env=env).stdout
    assert "memory growth         on" in told
    path.write_text("# mine\n")
    assert server.tfgpu("init", "--machine", env=env).returncode == 1
    assert path.read_text() == "# mine\n"
    assert server.tfgpu("init", "--machine", "--force", env=env).returncode == 0


def test_who_is_not_root_is_told_what_to_do(server: SharedMachine) -> None:
    """The machine's policy is root's: exit code 2, and a draft is offered."""
    refused = server.tfgpu("init", "--machine", user=ALICE)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "tfgpu init: only root can write to /etc/tfgpu; use sudo, or write a draft with --path DIR\n"
    )
    drafted = server.tfgpu("init", "--machine", "--path", "draft", cwd="/home/alice", user=ALICE)
    assert drafted.returncode == 0
    server.run(ROOT, "cp", "-r", "/home/alice/draft/.", "/etc/tfgpu")
    checked = server.tfgpu("check", "/etc/tfgpu").stdout
    assert checked == "ok: /etc/tfgpu/tfgpu.toml, /etc/tfgpu/tfgpu.test.toml\n"


def test_roots_draft_in_somebodys_folder(server: SharedMachine) -> None:
    """A draft may be root's in a directory of a user: checking it finds nothing."""
    server.tfgpu("init", "--machine", "--path", "/home/alice")
    assert server.tfgpu("check", "/home/alice").returncode == 0
