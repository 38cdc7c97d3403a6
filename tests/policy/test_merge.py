"""The two laws: the nearest setting wins, ceilings hold together."""

from __future__ import annotations

import pytest

from tests.policy.values import SUBJECT, make_layer, make_origin, make_table, pick
from tfenv.policy.merge import contains_project, merge
from tfenv.policy.model import Layer, LayerName, MemoryLimit, Setting, Subject, Tables

GIB = 1 << 30


def limit(size: int) -> MemoryLimit:
    return MemoryLimit(bytes=size * GIB)


def test_the_nearest_layer_that_sets_a_key_wins_key_by_key() -> None:
    """Project before user before machine, and a key only the machine sets stays the machine's."""
    policy = merge(
        [
            make_layer("machine", {"memory_limit": limit(8), "memory_growth": True, "allocator": "bfc"}),
            make_layer("user", {"memory_limit": limit(6), "memory_growth": False}),
            make_layer("project", {"memory_limit": limit(4)}),
        ],
        SUBJECT,
    )
    assert {key: (s.value, s.origin.layer) for key, s in policy.settings.items()} == {
        "memory_limit": (limit(4), "project"),
        "memory_growth": (False, "user"),
        "allocator": ("bfc", "machine"),
    }
    assert [s.origin.layer for s in policy.overridden["memory_limit"]] == ["user", "machine"]


def test_a_site_is_nearer_than_the_machine_and_farther_than_the_user() -> None:
    """A key of the site's replaces the machine's, and gives way to the user's."""
    layers = [
        make_layer("user", {"memory_growth": True}),
        make_layer("site", {"memory_limit": limit(6), "memory_growth": False}),
        make_layer("machine", {"memory_limit": limit(8)}),
    ]
    policy = merge(layers, SUBJECT)
    assert {key: s.origin.layer for key, s in policy.settings.items()} == {
        "memory_limit": "site", "memory_growth": "user",
    }  # fmt: skip


def test_a_run_option_is_nearer_than_the_project() -> None:
    """`tfgpu run --memory-limit` wins over the project's file."""
    layers = [make_layer("run", {"memory_growth": True}), make_layer("project", {"memory_growth": False})]
    policy = merge(layers, SUBJECT)
    assert policy.settings["memory_growth"].value is True


def make_tables(**named: int) -> dict[str, Tables]:
    limits = {name: make_table("machine", name, {"memory_limit": limit(size)}) for name, size in named.items()}
    return {name: Tables(ceiling=table) for name, table in limits.items()}


def test_inside_a_layer_the_more_specific_table_replaces() -> None:
    """[ceiling] < [group] in file order < [user] < [project] by longest path, since one author wrote them all."""
    made = Layer(
        name="machine",
        base=Tables(ceiling=make_table("machine", "ceiling", {"memory_limit": limit(1), "max_devices": 1})),
        groups=(*make_tables(students=2, vision=3, others=99).items(),),
        users=make_tables(alice=4, bob=99),
        projects={
            "/srv": Tables(ceiling=make_table("machine", "srv", {"memory_limit": limit(5)})),
            "/srv/p": Tables(ceiling=make_table("machine", "p", {"memory_limit": limit(6)})),
            "/srv/pq": Tables(ceiling=make_table("machine", "pq", {"memory_limit": limit(99)})),
        },
    )

    def get_ceilings(subject: Subject) -> dict[str, object]:
        return {c.key: c.value for c in merge([made], subject).ceilings}

    assert get_ceilings(SUBJECT) == {"memory_limit": limit(6), "max_devices": 1}
    assert get_ceilings(Subject("alice", 1, project="/home/alice"))["memory_limit"] == limit(4)
    assert get_ceilings(Subject("carol", 1, ("students", "vision")))["memory_limit"] == limit(3)
    assert get_ceilings(Subject("carol", 1, ("vision", "students")))["memory_limit"] == limit(3)
    assert get_ceilings(Subject("carol", 1))["memory_limit"] == limit(1)


def test_a_user_without_a_passwd_entry_is_named_by_uid() -> None:
    """`[user."uid:1234".gpu]` is for the uid, with or without an entry."""
    made = Layer(name="machine", users={"uid:1234": Tables(gpu=make_table("machine", "u", {"memory_growth": True}))})
    assert merge([made], Subject("uid:1234", 1234)).settings["memory_growth"].value is True
    assert merge([made], Subject("dora", 1234)).settings["memory_growth"].value is True
    assert "memory_growth" not in merge([made], Subject("dora", 1)).settings


def test_files_of_the_machine_layer_are_one_document() -> None:
    """groups/NAME.toml counts as [group.NAME]: users/NAME.toml and [user.NAME] of the main file beat it."""
    main = Layer(
        "machine", base=Tables(ceiling=make_table("machine", "c", {"max_devices": 1})), users=make_tables(alice=4)
    )
    group = Layer("machine", groups=(*make_tables(students=2).items(),))
    own = Layer("machine", users={"alice": Tables(ceiling=make_table("machine", "own", {"max_devices": 3}))})
    held = {c.key: c.value for c in merge([main, group, own], SUBJECT).ceilings}
    assert held == {"memory_limit": limit(4), "max_devices": 3}


def test_a_groups_own_file_comes_after_all_groups_of_the_main_file() -> None:
    """groups/students.toml replaces [group.vision] of tfgpu.toml, also where that has a [group.students] before it."""
    main = Layer("machine", groups=(*make_tables(students=1, vision=2).items(),))
    own = Layer("machine", groups=(*make_tables(students=3).items(),))
    (held,) = merge([main, own], SUBJECT).ceilings
    assert held.value == limit(3)
    (held,) = merge([main], SUBJECT).ceilings
    assert held.value == limit(2)


@pytest.mark.parametrize(
    ("root", "path", "inside"),
    [
        ("/srv/a", "/srv/a", True),
        ("/srv/a/", "/srv/a/b", True),
        ("/srv/a", "/srv/ab", False),
        ("/", "/srv", True),
        ("/srv/a/b", "/srv/a", False),
    ],
)
def test_projects_are_compared_by_path_components(root: str, path: str, *, inside: bool) -> None:
    """`[project."/srv/a"]` is not for /srv/ab."""
    assert contains_project(root, path) is inside


def make_audit(name: LayerName, **values: object) -> Layer:
    """A layer with an [audit] table."""
    return Layer(name, audit=(make_table(name, "audit", values),))


def test_audit_sinks_add_up() -> None:
    """A project cannot replace the administrator's log. Its own is relative to its file."""
    machine = make_audit("machine", file="/var/log/tfgpu/<uid>.jsonl", syslog=True)
    policy = merge([machine, make_audit("project", file="log/a.jsonl")], SUBJECT)
    assert policy.audit.files == ("/var/log/tfgpu/<uid>.jsonl", "/srv/p/log/a.jsonl")
    assert policy.audit.required_files == ("/var/log/tfgpu/<uid>.jsonl",)
    assert policy.audit.syslog
    assert policy.audit.required_syslog


@pytest.mark.parametrize(
    ("declared", "on", "required"),
    [
        ({}, False, False),
        ({"machine": False, "user": False}, False, False),
        ({"machine": False, "project": True}, True, False),
        ({"machine": True, "user": False}, True, True),
        ({"site": True, "user": False}, True, False),
    ],
    ids=str,
)
def test_syslog_is_required_where_the_machine_asks_for_it(
    declared: dict[LayerName, bool], *, on: bool, required: bool
) -> None:
    """Anybody may add syslog and nobody can take it away. `on_error` applies only where the machine asks for it."""
    sinks = merge([make_audit(name, syslog=value) for name, value in declared.items()], SUBJECT).audit
    assert (sinks.syslog, sinks.required_syslog) == (on, required)


@pytest.mark.parametrize(
    ("files", "kept", "default"),
    [
        ({}, (), True),
        ({"project": "a.jsonl"}, ("/srv/p/a.jsonl",), True),
        ({"project": "none"}, (), True),
        ({"user": "/u"}, ("/u",), False),
        ({"machine": "/m"}, ("/m",), False),
        ({"machine": "/m", "user": "/u", "project": "a"}, ("/m", "/u", "/srv/p/a"), False),
        ({"user": "none"}, (), False),
        ({"machine": "none", "project": "a"}, ("/srv/p/a",), False),
        ({"machine": "/m", "user": "none"}, ("/m",), False),
        ({"machine": "none", "user": "/u"}, ("/u",), False),
        ({"site": "/s", "project": "a"}, ("/s", "/srv/p/a"), False),
        ({"site": "none"}, (), False),
        ({"machine": "/m", "site": "none"}, ("/m",), False),
    ],
    ids=str,
)
def test_the_default_log_is_the_machines_and_the_users_affair(
    files: dict[LayerName, str], kept: tuple[str, ...], *, default: bool
) -> None:
    """It stays on beside a project's file, and goes where machine, site or user name a file or "none"."""
    sinks = merge([make_audit(name, file=path) for name, path in files.items()], SUBJECT).audit
    assert (sinks.files, sinks.default_file) == (kept, default)
    assert sinks.required_files == tuple(path for path in kept if path == "/m")


@pytest.mark.parametrize(
    ("declared", "held"),
    [
        ({}, "summary"),
        ({"project": "none"}, "none"),
        ({"user": "json", "project": "none"}, "json"),
        ({"machine": "json", "project": "none"}, "json"),
        ({"machine": "summary", "user": "none", "project": "json"}, "summary"),
        ({"machine": "none", "run": "json"}, "none"),
        ({"site": "json", "user": "none"}, "json"),
        ({"machine": "none", "site": "json"}, "none"),
    ],
    ids=str,
)
def test_the_farthest_value_of_stderr_holds(declared: dict[LayerName, str], held: str) -> None:
    """A project cannot silence the administrator. It chooses where no farther layer has a value."""
    layers = [make_audit(name, stderr=value) for name, value in declared.items()]
    assert merge(layers, SUBJECT).audit.stderr == held
    assert merge(reversed(layers), SUBJECT).audit.stderr == held


def test_inside_a_layer_the_more_specific_value_of_stderr_holds() -> None:
    """users/NAME.toml replaces the value of the machine's main file: one author wrote both."""
    policy = merge([make_audit("machine", stderr="json"), make_audit("machine", stderr="none")], SUBJECT)
    assert policy.audit.stderr == "none"


def test_only_the_machine_layer_forbids_switching_off() -> None:
    """`allow_disable = false` counts where the administrator wrote it."""
    switch = {"allow_disable": Setting(False, make_origin("machine", "machine", "allow_disable"))}
    assert merge([Layer("machine", machine=switch)], SUBJECT).allow_disable is False
    assert merge([Layer("project", machine=switch)], SUBJECT).allow_disable is True


def test_a_policy_without_settings_and_ceilings_is_silent() -> None:
    """A file that only names a log leaves TensorFlow as it is."""
    assert merge([make_layer("project", on_error="warn")], SUBJECT).silent
    assert not merge([make_layer("project", {"visible_devices": pick(0)})], SUBJECT).silent
