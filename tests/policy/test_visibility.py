"""Which GPUs: the grant, what is allowed, what is chosen, what the program asks for. Nothing ever widens."""

from __future__ import annotations

import pytest

from tests.policy.values import (
    CARDS,
    GIB,
    INVENTORY,
    NO_GRANT,
    NO_NVML,
    PATHS,
    SUBJECT,
    list_codes,
    list_devices,
    make_layer,
    make_origin,
    pick,
    pick_name,
    pick_uuid,
    plan,
)
from tfenv.errors import PROGRAM
from tfenv.policy.merge import merge
from tfenv.policy.model import (
    Allocation,
    AutoChoice,
    DeviceRule,
    Grant,
    Inventory,
    Layer,
    MemoryLimit,
    RankChoice,
    Selector,
)
from tfenv.policy.resolve import NO_GPU
from tfenv.policy.visibility import needs_inventory
from tfenv.values import replace

# ---- which GPUs


@pytest.mark.parametrize("inventory", [INVENTORY, NO_NVML])
def test_positions_are_written_as_tokens_with_and_without_nvml(inventory: Inventory) -> None:
    """[1, 0] becomes CUDA_VISIBLE_DEVICES=1,0, in the order asked for, under nvidia-smi's numbering."""
    made = plan(make_layer("project", {"visible_devices": pick(1, 0)}), inventory=inventory)
    assert (made.visible, made.pci_order) == ("1,0", True)


@pytest.mark.parametrize(
    ("match", "grant", "asked", "expected"),
    [
        (pick(0)[0], NO_GRANT, None, True),
        (pick_name("*T4*"), NO_GRANT, None, True),
        (pick_uuid("GPU-00"), NO_GRANT, None, True),
        (None, NO_GRANT, None, False),
        (pick(0)[0], NO_GRANT, "1", False),
        (pick(0)[0], Grant(("1", "0")), None, False),
    ],
)
def test_limits_by_card_count_as_nvidia_smi_does(
    match: Selector | None, grant: Grant, asked: str | None, expected: bool
) -> None:
    """A position is the same card as in `visible_devices`. The order of a list that others wrote is theirs."""
    rule = match and DeviceRule(match, make_origin("project", "gpu", "device", 0), MemoryLimit(bytes=GIB))
    layer = make_layer("project", {"memory_growth": True} if rule is None else {"device": (rule,)})
    made = plan(layer, grant=grant, request=asked)
    assert (made.pci_order, made.visible) == (expected, None)


def test_positions_count_within_the_grant_and_tokens_stay_verbatim() -> None:
    """Position 1 of a grant of two UUIDs is the second of them, as the scheduler wrote it."""
    grant = Grant((CARDS[3].uuid[:12], CARDS[2].uuid))
    made = plan(make_layer("project", {"visible_devices": pick(1)}), grant=grant)
    assert (made.visible, made.pci_order) == (CARDS[2].uuid, False)


def test_positions_count_within_what_the_administrator_allows() -> None:
    """Position 0 is the first GPU of grant and machine's allowed devices together."""
    machine = make_layer("machine", ceiling={"allowed_devices": pick(2, 3)})
    assert plan(machine, make_layer("project", {"visible_devices": pick(0)})).visible == "2"
    assert plan(machine, make_layer("user", {"visible_devices": pick(1)}), inventory=NO_NVML).visible == "3"


def test_numbers_of_the_machine_layer_are_the_machines_own() -> None:
    """`allowed_devices = [2]` is nvidia-smi's GPU 2, wherever it stands in the grant."""
    grant = Grant((CARDS[3].uuid, CARDS[2].uuid))
    assert plan(make_layer("machine", ceiling={"allowed_devices": pick(2)}), grant=grant).visible == CARDS[2].uuid


def test_uuids_and_names_select_devices() -> None:
    """A UUID prefix names one card, a glob on the product name all that match, whatever their case."""
    assert plan(make_layer("project", {"visible_devices": (pick_uuid("GPU-00000002"),)})).visible == "2"
    assert plan(make_layer("project", {"visible_devices": (pick_name("*t4"),)})).visible == "2,3"


@pytest.mark.parametrize("asked", [pick(7), (pick_name("*H200*"),), (pick_uuid("GPU-ffff"),)])
def test_a_request_for_nothing_that_exists_keeps_the_list_with_a_finding(asked: tuple[Selector, ...]) -> None:
    """Nobody trains on the CPU for days because of a typing error."""
    made = plan(make_layer("project", {"visible_devices": asked}))
    assert made.visible == "0,1,2,3"
    assert list_codes(made) == ["no-overlap"]
    assert made.findings[0].severity == "error"


def test_a_request_for_too_much_keeps_what_there_is() -> None:
    """[0, 9] on four cards is [0], with a warning."""
    made = plan(make_layer("project", {"visible_devices": pick(0, 9)}))
    assert (made.visible, list_codes(made)) == ("0", ["no-such-device"])


def test_none_is_honoured() -> None:
    """`visible_devices = "none"` means it, without a finding."""
    made = plan(make_layer("project", {"visible_devices": ()}))
    assert (made.visible, made.devices, made.findings) == (NO_GPU, (), ())


def test_all_changes_nothing() -> None:
    """ "all" leaves CUDA_VISIBLE_DEVICES alone, and so does a policy without `visible_devices`."""
    assert plan(make_layer("project", {"visible_devices": "all"})).visible is None
    assert plan(make_layer("project", {"memory_growth": True})).visible is None


def test_the_fewest_devices_hold() -> None:
    """The smallest max_devices of all layers cuts the list, with a finding."""
    made = plan(make_layer("machine", ceiling={"max_devices": 3}), make_layer("project", ceiling={"max_devices": 2}))
    assert made.visible == "0,1"
    assert "clamped" in list_codes(made)
    assert plan(make_layer("machine", ceiling={"max_devices": 2}), inventory=NO_NVML).visible == "0,1"


def test_the_grant_and_the_administrator_may_leave_nothing_together() -> None:
    """A grant of GPU 0 where GPU 1 is allowed gives neither: no GPU, loudly."""
    made = plan(make_layer("machine", ceiling={"allowed_devices": pick(1)}), grant=Grant(("0",), pci_order=True))
    assert (made.visible, list_codes(made)) == (NO_GPU, ["no-overlap"])


def test_what_the_administrator_allows_by_name_needs_nvml() -> None:
    """Without NVML nobody knows which cards these are: no GPU, and the finding does not blame the grant."""
    by_name = make_layer("machine", ceiling={"allowed_devices": (pick_name("*A100*"),)})
    made = plan(by_name, inventory=NO_NVML)
    assert (made.visible, list_codes(made)) == (NO_GPU, ["no-inventory"])
    by_uuid = make_layer("machine", ceiling={"allowed_devices": (pick_uuid("GPU-00000001"),)})
    assert list_codes(plan(by_uuid, grant=Grant(("1",)), inventory=NO_NVML)) == ["no-inventory"]


def test_require_grant_means_no_gpu_in_a_job_without_one() -> None:
    """Inside a scheduler's job an unset CUDA_VISIBLE_DEVICES means no GPU, outside of one all."""
    machine = make_layer("machine", ceiling={"require_grant": True})
    assert plan(machine, grant=Grant(scheduler=True)).visible == NO_GPU
    assert plan(machine, grant=Grant(("1",), scheduler=True)).visible == "1"
    assert plan(machine).visible == "0,1,2,3"


CHOOSING = (
    make_layer("machine", ceiling={"allowed_devices": pick(1, 2, 3)}),
    make_layer("user", {"visible_devices": AutoChoice(2, when_busy="share")}),
)


def test_an_automatic_choice_leaves_the_candidates_until_it_is_made() -> None:
    """`{count = 2}` shows all allowed cards before the choice, and the chosen ones after it."""
    made = plan(*CHOOSING)
    assert (made.visible, list_codes(made)) == ("1,2,3", [])
    assert made.choosing == AutoChoice(2, when_busy="share")
    chosen = plan(*CHOOSING, allocations=(Allocation(CARDS[3].uuid), Allocation(CARDS[1].uuid)))
    assert (chosen.visible, chosen.choosing) == ("1,3", None)


def test_an_allocation_outside_the_candidates_widens_nothing() -> None:
    """A GPU that was chosen elsewhere does not pass the ceilings. Without an allocation there is no GPU."""
    assert plan(*CHOOSING, allocations=(Allocation(CARDS[0].uuid), Allocation(CARDS[1].uuid))).visible == "1"
    assert plan(*CHOOSING, allocations=()).visible == NO_GPU


def test_ceilings_bound_how_many_are_chosen_not_which() -> None:
    """`max_devices = 1` beside `{count = 2}`: one of all the candidates, and a clamp that names the ceiling."""
    made = plan(*CHOOSING, make_layer("project", ceiling={"max_devices": 1}))
    assert (made.visible, list_codes(made)) == ("1", ["clamped"]), "more would be visible before the choice"
    assert [device.token for device in made.devices or ()] == ["1", "2", "3"]
    assert made.choosing is not None
    assert made.choosing.count == 1
    assert "project" not in (made.findings[0].path or "")
    few = plan(make_layer("machine", ceiling={"allowed_devices": pick(2)}), CHOOSING[1])
    assert (few.visible, list_codes(few)) == ("2", ["clamped"])
    assert plan(CHOOSING[1], make_layer("machine", ceiling={"max_devices": 0})).visible == NO_GPU


def test_the_program_narrows_the_candidates() -> None:
    """CUDA_VISIBLE_DEVICES of the program's own leaves those cards to choose from. A request for the CPU is kept."""
    assert plan(*CHOOSING, request="3,2,0").visible == "3,2"
    assert plan(*CHOOSING, request="").choosing is None


def test_without_nvml_an_automatic_choice_waits_for_whoever_can_tell() -> None:
    """Nothing is written before the first listing. Then the first ones are taken by their numbers."""
    alone = CHOOSING[1]
    assert plan(alone, inventory=NO_NVML).visible is None
    assert plan(alone, inventory=NO_NVML, allocations=(Allocation("0"), Allocation("1"))).visible == "0,1"
    grant = Grant(("3", "1", "2"))
    granted = plan(alone, inventory=NO_NVML, grant=grant, allocations=(Allocation("3"), Allocation("1")))
    assert granted.visible == "3,1"


def test_each_rank_takes_its_own_place() -> None:
    """Local ranks spread over the list. More ranks than cards share, with a finding."""
    project = make_layer("project", {"visible_devices": RankChoice()})
    assert [plan(project, grant=Grant(rank=rank)).visible for rank in range(4)] == ["0", "1", "2", "3"]
    assert plan(project).visible == "0,1,2,3"
    assert list_codes(plan(project, grant=Grant(("3",), rank=1))) == ["more-ranks-than-gpus"]


# ---- what the program asks for


def test_the_program_may_narrow() -> None:
    """CUDA_VISIBLE_DEVICES set by the script is intersected with the policy, in the script's order."""
    project = make_layer("project", {"visible_devices": pick(0, 1, 2)})
    assert plan(project, request="2,1").visible == "2,1"
    assert plan(project, request="").visible == NO_GPU
    assert plan(project, request="-1").visible == NO_GPU


def test_the_program_may_not_widen() -> None:
    """A request beyond the list is cut to the list. One that would leave nothing keeps it."""
    project = make_layer("project", {"visible_devices": pick(1, 2)})
    wider = plan(project, request="0,1,3")
    assert (wider.visible, list_codes(wider)) == ("1", ["clamped"])
    elsewhere = plan(project, request="0")
    assert (elsewhere.visible, list_codes(elsewhere)) == ("1,2", ["no-overlap"])


def test_the_program_chooses_before_devices_are_counted() -> None:
    """Under max_devices = 1 a script that names GPU 2 gets GPU 2, not nothing."""
    assert plan(make_layer("machine", ceiling={"max_devices": 1}), request="2").visible == "2"


def test_a_policy_without_visibility_leaves_the_programs_list() -> None:
    """Only growth is declared: whatever the program writes stays."""
    made = plan(make_layer("project", {"memory_growth": True}), grant=Grant(("0",), pci_order=True), request="3")
    assert made.visible is None
    assert list_devices(made) == [CARDS[3]]


def test_nvml_is_asked_only_where_visibility_needs_it() -> None:
    """Positions need no NVML. Names do, and so do numbers beside UUIDs."""

    def needs(*made: Layer, grant: Grant = NO_GRANT, request: tuple[str, ...] | None = None) -> bool:
        return needs_inventory(merge(made, SUBJECT), grant, request)

    by_position = make_layer("project", {"visible_devices": pick(0, 1)})
    assert not needs(by_position)
    assert not needs(by_position, grant=Grant((CARDS[0].uuid,)))
    assert needs(make_layer("project", {"visible_devices": (pick_name("*"),)}))
    assert needs(make_layer("machine", ceiling={"allowed_devices": pick(0)}), grant=Grant((CARDS[0].uuid,)))
    assert needs(make_layer("project", {"visible_devices": (pick_uuid("GPU-1"),)}), request=("0",))


# ---- who asked, and what held


def test_a_clamp_names_the_key_that_took_the_gpu_away() -> None:
    """GPU 0 is the administrator's to give, GPU 1 the project's: each finding names the one that held, or the grant."""
    machine = make_layer("machine", ceiling={"allowed_devices": pick(1, 2, 3)})
    project = make_layer("project", {"visible_devices": pick(1, 2)})
    (outside,) = plan(machine, project, request="0,2").findings
    assert (outside.path, outside.key, outside.asked_by) == (PATHS["machine"], "ceiling.allowed_devices", PROGRAM)
    (other,) = plan(machine, project, request="1,2").findings
    assert (other.path, other.key) == (PATHS["project"], "gpu.visible_devices")
    assert other.held_by == f"{PATHS['project']} (gpu.visible_devices)"
    (granted,) = plan(machine, grant=Grant(("1", "2"), pci_order=True), request="3,2").findings
    assert (granted.path, granted.held_by) == (None, "the grant (1,2)")


def test_a_request_that_leaves_nothing_names_what_held() -> None:
    """A file's and the program's request for GPU 0 alone keep the list, and name the ceiling that forbids it."""
    machine = make_layer("machine", ceiling={"allowed_devices": pick(1, 2)})
    by_file = plan(machine, make_layer("user", {"visible_devices": (pick_uuid("GPU-00000000"),)})).findings[0]
    by_program = plan(machine, request="0").findings[0]
    assert [by_file.code, by_program.code] == ["no-overlap", "no-overlap"]
    assert [by_file.asked_by, by_program.asked_by] == [f"{PATHS['user']} (gpu.visible_devices)", PROGRAM]
    for finding in (by_file, by_program):
        assert finding.held_by == f"{PATHS['machine']} (ceiling.allowed_devices)"
        assert str(finding.held_by) in finding.message


def test_the_smallest_count_names_who_asked_for_more() -> None:
    """Of several `max_devices` the smallest holds and is named, once."""
    machine, user = make_layer("machine", ceiling={"max_devices": 3}), make_layer("user", ceiling={"max_devices": 1})
    (finding,) = plan(machine, user, make_layer("project", {"visible_devices": pick(0, 1)})).findings
    assert (finding.path, finding.asked_by) == (PATHS["user"], f"{PATHS['project']} (gpu.visible_devices)")
    assert plan(machine, user, request="1,2").findings[0].asked_by == PROGRAM
    assert plan(machine, user).findings[0].asked_by is None


# ---- every rank on one card

ONE_CARD = {
    "a list of one": make_layer("project", {"visible_devices": pick(0)}),
    "one device for everybody": make_layer("machine", ceiling={"max_devices": 1}),
    "one allowed device of a user": make_layer("user", ceiling={"allowed_devices": pick(2)}),
}


@pytest.mark.parametrize("made", ONE_CARD.values(), ids=ONE_CARD)
@pytest.mark.parametrize("inventory", [INVENTORY, NO_NVML], ids=["nvml", "blind"])
def test_a_list_of_one_never_piles_all_ranks_on_one_card_silently(made: Layer, inventory: Inventory) -> None:
    """From the second local rank on a warning tells that all share a GPU, and what would spread them."""
    piled = plan(made, grant=Grant(rank=1), inventory=inventory)
    (finding,) = [finding for finding in piled.findings if finding.code == "ranks-share-a-gpu"]
    assert finding.severity == "warning"
    assert 'rank = "auto"' in finding.message
    assert finding.path in PATHS.values()
    for rank in (None, 0):
        assert "ranks-share-a-gpu" not in list_codes(plan(made, grant=Grant(rank=rank), inventory=inventory))


def test_ranks_that_have_gpus_of_their_own_are_not_warned() -> None:
    """A grant of one GPU per rank, a list of several, and a program that chose by itself pile up nothing."""
    project = make_layer("project", {"visible_devices": pick(0)})
    assert list_codes(plan(project, grant=Grant(("3",), rank=1))) == []
    assert list_codes(plan(make_layer("project", {"visible_devices": pick(0, 1)}), grant=Grant(rank=1))) == []
    assert list_codes(plan(make_layer("machine", ceiling={"max_devices": 1}), grant=Grant(rank=1), request="1")) == []
    assert list_codes(plan(grant=Grant(rank=1))) == []


def test_a_rank_that_was_granted_one_gpu_may_have_it_for_itself() -> None:
    """`srun --gpus-per-task=1` gives each rank one. Nobody can tell whether it is shared, so it is no error."""
    project = make_layer("project", {"visible_devices": RankChoice()})
    assert plan(project, grant=Grant(("3",), rank=1)).findings[0].severity == "warning"
    assert plan(project, grant=Grant(("2", "3"), rank=2)).findings[0].severity == "error"


# ---- what a job was given


@pytest.mark.parametrize(
    ("tokens", "listed", "visible", "codes"),
    [
        (("0", "1", "2", "3"), ("0",), "0", ["clamped"]),
        (("3", "1"), ("1", "3"), None, []),
        (("2",), ("0", "1"), "0,1", ["no-overlap"]),
        (None, ("1", "2"), "1,2", []),
        (("-1",), ("1",), None, []),
        ((CARDS[1].uuid, CARDS[0].uuid), ("0",), CARDS[0].uuid, ["clamped"]),
        (("2",), (), NO_GPU, ["no-grant"]),
        (None, (CARDS[2].uuid,), CARDS[2].uuid, []),
        ((CARDS[2].uuid[:12], CARDS[0].uuid), (CARDS[2].uuid, CARDS[3].uuid), CARDS[2].uuid[:12], ["clamped"]),
    ],
)
def test_in_a_job_cuda_visible_devices_only_narrows_what_the_scheduler_lists(
    tokens: tuple[str, ...] | None, listed: tuple[str, ...], visible: str | None, codes: list[str]
) -> None:
    """A batch script's own list is a wish. What leaves no GPU keeps the job's, and says so."""
    made = plan(make_layer("user", {"memory_growth": True}), grant=Grant(tokens, listed=listed, launcher="Slurm"))
    assert (made.visible, list_codes(made)) == (visible, codes)


@pytest.mark.parametrize("tokens", [("0", "1"), ("1",), None])
def test_a_scheduler_that_hides_the_other_gpus_counts_the_jobs_from_0(tokens: tuple[str, ...] | None) -> None:
    """Slurm with ConstrainDevices lists 2 and 3, CUDA and NVML show two GPUs: both are the job's."""
    shown = Inventory(tuple(replace(card, index=index) for index, card in enumerate(CARDS[2:])))
    made = plan(make_layer("user", {"memory_growth": True}), grant=Grant(tokens, listed=("2", "3")), inventory=shown)
    assert (made.visible, [device.uuid for device in list_devices(made)], list_codes(made)) == (
        None,
        [shown.devices[int(token)].uuid for token in tokens or ("0", "1")] if shown.devices else [],
        [],
    )


def test_without_nvml_a_list_beyond_the_jobs_is_cut_to_it() -> None:
    """Nothing tells whether the scheduler has counted anew. Fewer GPUs are never somebody else's."""
    made = plan(
        make_layer("user", {"memory_growth": True}), grant=Grant(("0", "1"), listed=("1", "2")), inventory=NO_NVML
    )
    assert made.visible == "1"


@pytest.mark.parametrize(
    ("grant", "value", "visible"),
    [
        (Grant(("2",), scheduler=True, unlisted=True, launcher="Slurm"), True, NO_GPU),
        (Grant(("2",), scheduler=True, unlisted=True, launcher="Slurm"), False, None),
        (Grant(("2",), scheduler=True, listed=("2",)), True, "2"),
        (Grant(None, scheduler=True, listed=("2",)), True, "2"),
        (Grant(None, scheduler=True, unlisted=True, mounted=True), True, "0,1,2,3"),
        (Grant(("2",)), "always", NO_GPU),
        (Grant(), "always", NO_GPU),
        (Grant(("2",), scheduler=True), "always", "2"),
        (Grant(None, scheduler=True), "always", NO_GPU),
    ],
)
def test_require_grant_asks_for_what_a_scheduler_gave(grant: Grant, value: object, visible: str | None) -> None:
    """A script's own list is no grant where the scheduler lists what it gives. "always" counts jobs' GPUs alone."""
    made = plan(make_layer("machine", ceiling={"require_grant": value} if value else {}), grant=grant)
    assert made.visible == visible
    assert [finding.severity for finding in made.findings] == (["note"] if visible == NO_GPU else [])


def test_a_job_without_gpus_on_a_machine_without_a_driver_has_nothing_to_enforce() -> None:
    """Nothing is wrong with a policy that names GPUs, so `on_error` has nothing to decide."""
    no_driver = Inventory(problem="NVML: libnvidia-ml.so.1 is missing", no_driver=True)
    layer = make_layer("project", {"visible_devices": (pick_name("*A100*"),)}, on_error="fail")
    made = plan(layer, grant=Grant(scheduler=True, unlisted=True, launcher="Slurm"), inventory=no_driver)
    assert (made.visible, made.devices) == (NO_GPU, ())
    assert [finding.severity for finding in made.findings] == ["note"]
    without_nvml = replace(no_driver, no_driver=False)  # a container may have CUDA and no NVML
    made = plan(layer, grant=Grant(scheduler=True, unlisted=True, launcher="Slurm"), inventory=without_nvml)
    assert list_codes(made) == ["no-inventory"]


def test_a_rank_that_nobody_gave_is_said() -> None:
    """`{rank = "auto"}` outside of mpirun, torchrun and srun: the process has all GPUs, with a warning."""
    project = make_layer("project", {"visible_devices": RankChoice()})
    made = plan(project)
    assert (made.visible, list_codes(made)) == ("0,1,2,3", ["no-rank"])
    assert made.findings[0].severity == "warning"


def test_a_rank_with_gpus_of_its_own_keeps_them() -> None:
    """srun --gpus-per-task=1 has divided the GPUs: there is nothing to divide, and nothing to warn of."""
    project = make_layer("project", {"visible_devices": RankChoice()})
    for rank in (0, 1):
        assert list_codes(plan(project, grant=Grant(("3",), rank=rank, own_gpus=True))) == []
        assert plan(project, grant=Grant(("2", "3"), rank=rank, own_gpus=True)).visible == "2,3"


@pytest.mark.parametrize(
    ("wanted", "handed", "visible"),
    [((0,), "2", "2"), ((0, 1), "1", "1"), ((0, 1), "1,2", "1,2"), ((2, 3), "0", "2,3"), ((2, 3), "0,3", "3")],
)
def test_what_a_parent_writes_for_a_child_is_the_childs_grant(
    wanted: tuple[int, ...], handed: str, visible: str
) -> None:
    """Positions count in it: workers under [0] that were given 1 and 2 use 1 and 2.

    A list that leaves the policy nothing was counted in what the parent sees: the policy's own GPUs stay.
    """
    tokens = tuple(handed.split(","))
    made = plan(make_layer("project", {"visible_devices": pick(*wanted)}), grant=Grant(handed=tokens), request=handed)
    assert made.visible == visible
    own = plan(make_layer("project", {"visible_devices": pick(0)}), grant=Grant(handed=("1",)), request="2")
    assert (own.visible, list_codes(own)) == ("0", ["no-overlap"])  # the program asked for another one since


def test_a_childs_grant_is_within_every_ceiling() -> None:
    """The administrator allows GPU 0. A worker that its parent gave GPU 2 has GPU 0, and that is said."""
    machine = make_layer("machine", ceiling={"allowed_devices": pick(0)})
    made = plan(machine, grant=Grant(handed=("2",)), request="2")
    assert (made.visible, list_codes(made)) == ("0", ["no-overlap"])
