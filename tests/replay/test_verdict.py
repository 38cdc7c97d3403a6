"""What another policy would have given to the process of a record."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.machine import CARDS, GIB
from tfenv.audit.query import LoggedRecord
from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.config.document import Trust
from tfenv.errors import Finding
from tfenv.pipeline import read_layers
from tfenv.policy.merge import merge
from tfenv.policy.model import (
    DeviceOutcome,
    Grant,
    Inventory,
    Outcome,
    OutcomeStatus,
    Source,
    Subject,
)
from tfenv.policy.resolve import resolve
from tfenv.replay.draft import DraftPolicy
from tfenv.replay.knowledge import Knowledge
from tfenv.replay.run import make_lookup
from tfenv.replay.verdict import Verdict, judge, read_subject
from tfenv.values import replace

ALICE = Subject("alice", 1000, ("students",), "/srv/vision")
PROCESS = ProcessFacts(7, 1, "node1", "/srv/train.py", "3.11.7", "tensorflow")
MACHINE = Source("machine", "/etc/tfgpu/tfgpu.toml")


def read_policy(text: str) -> DraftPolicy:
    read = read_layers([Source("machine", "/draft/tfgpu.toml", text=text)], Trust(0), today="2026-11-05")
    assert [finding for finding in read.findings if finding.severity == "error"] == []
    return DraftPolicy(read.documents, read.layers)


def make_record(
    *devices: DeviceOutcome,
    subject: Subject = ALICE,
    grant: Grant = Grant(),  # noqa: B008 - it is frozen
    status: OutcomeStatus = "applied",
    sources: tuple[Source, ...] = (MACHINE,),
    findings: tuple[Finding, ...] = (),
    growth: bool | None = None,
    asked: dict[str, object] | None = None,
    without: tuple[str, ...] = (),
    **differences: Any,
) -> LoggedRecord:
    """Return a record as it is written and read. The differences are to its fields."""
    outcome = Outcome(status, "x", devices, growth, asked or {}, findings=findings)
    record = make_outcome_record(RecordContext(PROCESS, subject, grant, sources), outcome).as_dict()
    read: dict[str, Any] = json.loads(encode_record(record))
    return {name: value for name, value in {**read, **differences}.items() if name not in without}


def make_device(number: int = 0, limit: int | None = 8 * GIB, **fields: Any) -> DeviceOutcome:
    card = CARDS[number]
    given_ = {"token": str(number), "uuid": card.uuid, "name": card.name, "limit": limit, "total": card.total}
    return DeviceOutcome(number, **{**given_, **fields})


def replay(text: str, *records: LoggedRecord, observed: bool = False) -> Verdict:
    """Return what a policy would have given to the first of these records."""
    knowledge = Knowledge()
    for record in records:
        knowledge.learn(record)
    lookup = make_lookup(read_policy(text), observed=observed)
    subject, gaps = read_subject(records[0], lookup)
    if subject is None:
        return Verdict((), gaps)
    verdict = judge(records[0], lookup.merge_for(subject), lookup, knowledge)
    return replace(verdict, gaps=(*gaps, *verdict.gaps))


def tell(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    return [(change.kind, change.gpu[:12], change.had, change.would_have) for change in verdict.changes]


LESS = [("less", "GPU-00000000", "8.0 GiB", "4.0 GiB")]
NOTHING = [("nothing", "GPU-00000000", CARDS[0].uuid, "no GPU")]
#: The policy -> what a student's process on GPU 0 with 8 GiB of 40 would have had.
CHANGES = {
    '[ceiling]\nmemory_limit = "4GiB"': LESS,
    '[ceiling]\nmemory_limit = "10%"': LESS,
    '[ceiling]\nmemory_total = "4GiB"': LESS,
    '[gpu]\nmemory_limit = "4GiB"': LESS,
    '[group.students.ceiling]\nmemory_limit = "4GiB"': LESS,
    '[user.alice.gpu]\nmemory_limit = "4GiB"': LESS,
    '[project."/srv".ceiling]\nmemory_limit = "4GiB"': LESS,
    '[[gpu.device]]\nmatch = 0\nmemory_limit = "4GiB"': LESS,
    '[[gpu.device]]\nmatch = "name:*A100"\nmemory_limit = "4GiB"': LESS,
    '[ceiling]\nmemory_limit = "8GiB"': [],
    '[ceiling]\nmemory_limit = "20GiB"': [],
    '[group.staff.ceiling]\nmemory_limit = "4GiB"': [],
    '[project."/srv/vis".ceiling]\nmemory_limit = "4GiB"': [],
    '[ceiling]\nmemory_limit = "4GiB"\n[user.alice.ceiling]\nmemory_limit = "20GiB"': [],
    "[ceiling]\nallowed_devices = [0, 1]\nmax_devices = 1": [],
    "[ceiling]\nallowed_devices = [1]": NOTHING,
    f'[ceiling]\nallowed_devices = ["{CARDS[1].uuid}"]': NOTHING,
    '[ceiling]\nallowed_devices = ["name:*H100*"]': NOTHING,
    '[gpu]\nvisible_devices = "none"': NOTHING,
    '[ceiling]\nrequire_grant = "always"': NOTHING,
    "[ceiling]\nrequire_grant = true": [],
    "[gpu]\nvisible_devices = {count = 1}": [],
    "[gpu]\nmemory_growth = true": [],
    '[observe.ceiling]\nmemory_limit = "4GiB"': [],
    '[user.alice]\nexpires = 2026-11-05\n[user.alice.ceiling]\nmemory_limit = "4GiB"': [],
    '[user.alice]\nexpires = 2026-11-06\n[user.alice.ceiling]\nmemory_limit = "4GiB"': LESS,
}


@pytest.mark.parametrize(("text", "expected"), CHANGES.items(), ids=CHANGES)
def test_a_policy_takes_what_it_says(text: str, expected: list[tuple[str, str, str, str]]) -> None:
    """What the process had and would not have had is told, and nothing else is."""
    verdict = replay(text, make_record(make_device()))
    assert (tell(verdict), verdict.gaps) == (expected, ())


def test_observed_tables_count_if_asked() -> None:
    """As if they were in force."""
    text = '[observe.ceiling]\nmemory_limit = "4GiB"'
    assert tell(replay(text, make_record(make_device()), observed=True)) == LESS


def test_the_rest_of_several_gpus_is_less_and_not_nothing() -> None:
    """The GPU that is lost has a row of its own. Without any GPU each has one that says so."""
    record = make_record(make_device(0), make_device(1))
    assert tell(replay("[ceiling]\nmax_devices = 1", record)) == [("less", "GPU-00000001", CARDS[1].uuid, "no GPU")]
    assert [kind for kind, *_ in tell(replay("[ceiling]\nallowed_devices = [3]", record))] == ["nothing"] * 2
    assert tell(replay("[gpu]\nvisible_devices = {count = 1}", record)) == [("less", "", "2 GPUs", "1 GPU")]


# ---- more


def make_clamped(
    *, asked: int, held_by: str = "/etc/tfgpu/tfgpu.toml (ceiling.memory_limit)", **more: Any
) -> LoggedRecord:
    finding = Finding("clamped", "less", "note", asked="memory_limit = much", held_by=held_by)
    device = make_device(asked=asked * GIB)
    project = Source("project", "/srv/vision/tfgpu.toml")
    fields = {"status": "clamped", "findings": (finding,), "sources": (MACHINE, project), **more}
    return make_record(device, **fields)


MORE = {
    ("", 20): [("more", "GPU-00000000", "8.0 GiB", "20.0 GiB")],
    ('[ceiling]\nmemory_limit = "12GiB"', 20): [("more", "GPU-00000000", "8.0 GiB", "12.0 GiB")],
    ('[ceiling]\nmemory_limit = "50%"', 30): [("more", "GPU-00000000", "8.0 GiB", "20.0 GiB")],
    ('[ceiling]\nmemory_limit = "8GiB"', 20): [],
    ('[gpu]\nmemory_limit = "12GiB"', 20): [("more", "GPU-00000000", "8.0 GiB", "20.0 GiB")],
    ('[ceiling]\nmemory_limit = "4GiB"', 20): LESS,
}


@pytest.mark.parametrize(("text", "asked"), MORE, ids=str)
def test_who_asked_for_more_would_get_it_up_to_the_limit(text: str, asked: int) -> None:
    """A file's own setting takes the place of the machine's, so only ceilings hold against it."""
    assert tell(replay(text, make_clamped(asked=asked))) == MORE[text, asked]


def test_nobody_gets_more_than_they_asked_for() -> None:
    """A process that was given what it wanted gets no more under a looser policy."""
    assert replay('[ceiling]\nmemory_limit = "30GiB"', make_record(make_device())) == Verdict()


def test_a_ceiling_of_a_file_of_ones_own_holds_all_the_same() -> None:
    """The machine's policy does not loosen what the project's file holds."""
    held_by = "/srv/vision/tfgpu.toml (ceiling.memory_limit)"
    assert replay("", make_clamped(asked=20, held_by=held_by)).changes == ()


def test_what_a_program_asks_for_counts_too() -> None:
    """A split in MiB, or a fraction, in the framework's own terms."""
    wants: list[dict[str, object]] = [
        {"virtual_devices": [[20480.0]]},
        {"per_process_gpu_memory_fraction": 0.5},
        {"memory_fraction": 0.5},
    ]
    for asked in wants:
        record = make_record(make_device(), status="clamped", asked=asked)
        assert tell(replay('[ceiling]\nmemory_limit = "30GiB"', record)) == MORE["", 20]


# ---- what the log does not hold

OWN = (MACHINE, Source("user", "/home/alice/.config/tfgpu/tfgpu.toml"))
SMALL = '[ceiling]\nmemory_limit = "10%"'
STUDENTS = '[group.students.ceiling]\nmemory_limit = "4GiB"'
GAPS = {
    "no-size": (SMALL, make_record(make_device(total=None))),
    "no-size for a share": ('[ceiling]\nmemory_limit = "4GiB"', make_record(make_device(limit=None, total=None))),
    "no-number": ("[ceiling]\nallowed_devices = [1]", make_record(make_device(), grant=Grant(("0",)))),
    "no-number in a job": (
        "[ceiling]\nallowed_devices = [1]",
        make_record(make_device(), grant=Grant(("0",), launcher="Slurm")),
    ),
    "no-card": ('[ceiling]\nallowed_devices = ["name:*H100*"]', make_record(make_device(name=None))),
    "no-card by UUID": (f'[ceiling]\nallowed_devices = ["{CARDS[1].uuid}"]', make_record(make_device(uuid=None))),
    "no-card of an instance": (
        f'[ceiling]\nallowed_devices = ["{CARDS[1].uuid}"]',
        make_record(make_device(uuid="MIG-1", token="MIG-1")),
    ),
    "no-card twice": ("[ceiling]\nmax_devices = 1", make_record(make_device(), make_device())),
    "no-rank": ('[gpu]\nvisible_devices = {rank = "auto"}', make_record(make_device())),
    "no-share": ('[ceiling]\nmemory_limit = "granted"', make_record(make_device())),
    "no-grant": ("[ceiling]\nrequire_grant = true", make_record(make_device(), launcher="Kubernetes")),
    "other-gpus": ("[gpu]\nvisible_devices = [3]", make_record(make_device())),
    "own-settings": ('[gpu]\nmemory_limit = "4GiB"', make_record(make_device(), sources=OWN)),
    "own-settings in records that lost them": (
        '[gpu]\nmemory_limit = "4GiB"',
        make_record(make_device(), without=("sources",)),
    ),
    "no-user": (STUDENTS, make_record(make_device(), user="nobody-like-this", without=("groups",))),
    "no-user by number": (SMALL, make_record(make_device(), uid="1000")),
    "cut-short": (STUDENTS, make_record(make_device(), truncated=True, dropped={"groups": 3})),
    "cut-short GPUs": (
        '[ceiling]\nmemory_limit = "9GiB"',
        make_record(make_device(), truncated=True, dropped={"devices": 3}),
    ),
}


@pytest.mark.parametrize(("name", "text", "record"), [(name, *case) for name, case in GAPS.items()], ids=GAPS)
def test_what_the_log_does_not_hold_is_said(name: str, text: str, record: LoggedRecord) -> None:
    """Nothing is guessed: the answer is that it is not known, and why."""
    verdict = replay(text, record)
    assert (verdict.changes, set(verdict.gaps), verdict.is_known) == ((), {name.partition(" ")[0]}, False)


def test_what_the_answer_does_not_need_may_be_missing() -> None:
    """A record that lacks everything but the limit is enough for a policy of a limit."""
    record = make_record(
        make_device(total=None, name=None), grant=Grant(("3",)), user="nobody-like-this", without=("groups", "sources")
    )
    assert tell(replay('[ceiling]\nmemory_limit = "4GiB"', record)) == LESS
    assert replay('[ceiling]\nmemory_limit = "9GiB"', record) == Verdict()


def test_a_ceiling_holds_whatever_files_of_ones_own_say() -> None:
    """It is certain even if settings are not."""
    text = '[ceiling]\nmemory_limit = "4GiB"\n[gpu]\nmemory_limit = "1GiB"'
    assert tell(replay(text, make_record(make_device(), sources=OWN))) == LESS


def test_sizes_and_numbers_are_known_from_other_records() -> None:
    """Of the same UUID. Where records differ it is not known."""
    here, other = make_record(make_device(total=None), grant=Grant(("7",))), make_record(make_device(0))
    assert tell(replay(SMALL, here, other)) == LESS
    assert tell(replay("[ceiling]\nallowed_devices = [1]", here, other)) == NOTHING
    contrary = make_record(make_device(0, total=GIB, token="5"))
    assert replay(SMALL, here, other, contrary).gaps == ("no-size",)


def test_groups_of_older_records_are_those_of_now() -> None:
    """They are looked up on this machine, and that is said."""
    verdict = replay(STUDENTS, make_record(make_device(), user="root", uid=0, without=("groups",)))
    assert (verdict.changes, verdict.gaps, verdict.is_known) == ((), ("groups-as-now",), True)


# ---- properties

CEILINGS = st.fixed_dictionaries(
    {},
    optional={
        "memory_limit": st.sampled_from(['"2GiB"', '"10%"', '"30%"', '"20GiB"', '"none"']),
        "memory_total": st.sampled_from(['"12GiB"', '"50%"']),
        "max_devices": st.integers(1, 4).map(str),
        "allowed_devices": st.sampled_from(["[0, 1, 2]", "[3]", '["name:*A100*"]', f'["{CARDS[2].uuid}"]']),
        "require_memory_growth": st.just("true"),
    },
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "memory_limit": st.sampled_from(['"3GiB"', '"15%"', '"24GiB"', '"none"']),
        "visible_devices": st.sampled_from(["[0]", "[0, 1]", '"all"', "{count = 2}", '"none"']),
        "memory_growth": st.sampled_from(["true", "false"]),
    },
)


@st.composite
def policies(draw: st.DrawFn) -> str:
    tables = {"gpu": SETTINGS, "ceiling": CEILINGS, "group.students.ceiling": CEILINGS, "user.alice.gpu": SETTINGS}
    text = ""
    for name, values in tables.items():
        text += f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in draw(values).items())
    return text


def run_process(text: str, part: float) -> LoggedRecord | None:
    """Return the record of a process that takes this part of what it may. None: it has no GPU, or no such policy."""
    policy = merge(read_policy(text).layers, ALICE)
    plan = resolve(policy, Grant(), Inventory(CARDS))
    if any(finding.severity == "error" for finding in plan.findings):
        return None  # as with visible_devices that the ceilings do not allow: it is not in force
    planned = plan.devices or ()
    if plan.choosing is not None:
        planned = planned[: plan.choosing.count]
    devices = []
    for index, card in enumerate(planned):
        limit = card.limit.on(card.total) if card.limit is not None else None
        least = card.total if limit is None else limit
        mine = limit if part == 1 else int((least or 0) * part)
        devices.append(card.describe(index, None, limit=mine, fraction=None))
    return make_record(*devices, growth=plan.growth) if devices else None


@given(policies(), st.sampled_from([1, 0.5]))
@settings(max_examples=150, deadline=None)
def test_the_policy_that_was_in_force_changes_nothing(text: str, part: float) -> None:
    """Whatever it says and whatever the process took: nobody gets less, more or nothing, and all is known."""
    record = run_process(text, part)
    assert record is None or replay(text, record) == Verdict()


@given(policies(), st.sampled_from([1, 0.5]), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_a_new_ceiling_takes_from_those_above_it_alone(text: str, part: float, ceiling: int) -> None:
    """Exactly the GPUs of which the process had more than the new ceiling are told."""
    record = run_process(text, part)
    if record is None:
        return
    sizes = {d["uuid"]: d["limit_bytes"] or d["total_bytes"] for d in record["devices"]}
    verdict = replay(f'{text}[project."/srv".ceiling]\nmemory_limit = "{ceiling}GiB"\n', record)
    # The ceiling of the project takes the place of one of the machine's that is smaller.
    assert {change.kind for change in verdict.changes} <= {"less"}
    assert {change.gpu for change in verdict.changes} == {
        uuid for uuid, size in sizes.items() if size > ceiling * GIB + (2 << 20)
    }


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
    | st.sampled_from([10**300, -1, "GPU-1", "MIG-1", "0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
DEVICE = st.dictionaries(
    st.sampled_from(["uuid", "token", "name", "index", "limit_bytes", "limit_fraction", "total_bytes", "asked_bytes"]),
    ANYTHING,
)
NAMES = (
    "user", "uid", "groups", "project", "devices", "growth", "grant", "launcher", "asked", "findings", "sources",
    "truncated", "dropped", "framework",
)  # fmt: skip


@given(
    policies(),
    st.dictionaries(st.sampled_from(NAMES), ANYTHING),
    st.lists(DEVICE, max_size=3) | ANYTHING,
    st.sampled_from(["policy_applied", "policy_clamped"]),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_records_of_any_shape_are_judged(text: str, fields: dict[str, Any], devices: Any, event: str) -> None:
    """What anybody may have written into a log never ends the command."""
    plain = {"uid": 1000, "user": "alice"}
    replay(text, {**plain, "devices": devices, **fields, "event": event, "timestamp": "1"})
