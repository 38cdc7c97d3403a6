"""Which GPUs: the grant, what is allowed, what is chosen, what the program asks; nothing ever widens."""

from __future__ import annotations

import pytest

from tests.policy.values import (
    BLIND,
    CARDS,
    FREE,
    INVENTORY,
    PATHS,
    SUBJECT,
    at,
    codes,
    devices_of,
    layer,
    name,
    plan,
    uuid,
)
from tfenv.errors import PROGRAM
from tfenv.policy.merge import merge
from tfenv.policy.model import Allocation, AutoChoice, Grant, Inventory, Layer, RankChoice, Selector
from tfenv.policy.resolve import NO_GPU, needs_inventory

# ---- which GPUs


@pytest.mark.parametrize("inventory", [INVENTORY, BLIND])
def test_positions_are_written_as_tokens_with_and_without_nvml(inventory: Inventory) -> None:
    """[1, 0] becomes CUDA_VISIBLE_DEVICES=1,0, in the order asked for, under nvidia-smi's numbering."""
    made = plan(layer("project", {"visible_devices": at(1, 0)}), inventory=inventory)
    assert (made.visible, made.pci_order) == ("1,0", True)


def test_positions_count_within_the_grant_and_tokens_stay_verbatim() -> None:
    """Position 1 of a grant of two UUIDs is the second of them, as the scheduler wrote it."""
    grant = Grant((CARDS[3].uuid[:12], CARDS[2].uuid))
    made = plan(layer("project", {"visible_devices": at(1)}), grant=grant)
    assert (made.visible, made.pci_order) == (CARDS[2].uuid, False)


def test_positions_count_within_what_the_administrator_allows() -> None:
    """Position 0 is the first GPU of grant and machine's allowed devices together."""
    machine = layer("machine", ceiling={"allowed_devices": at(2, 3)})
    assert plan(machine, layer("project", {"visible_devices": at(0)})).visible == "2"
    assert plan(machine, layer("user", {"visible_devices": at(1)}), inventory=BLIND).visible == "3"


def test_numbers_of_the_machine_layer_are_the_machines_own() -> None:
    """`allowed_devices = [2]` is nvidia-smi's GPU 2, wherever it stands in the grant."""
    grant = Grant((CARDS[3].uuid, CARDS[2].uuid))
    assert plan(layer("machine", ceiling={"allowed_devices": at(2)}), grant=grant).visible == CARDS[2].uuid


def test_uuids_and_names_select_devices() -> None:
    """A UUID prefix names one card, a glob on the product name all that match, whatever their case."""
    assert plan(layer("project", {"visible_devices": (uuid("GPU-00000002"),)})).visible == "2"
    assert plan(layer("project", {"visible_devices": (name("*t4"),)})).visible == "2,3"


@pytest.mark.parametrize("wish", [at(7), (name("*H200*"),), (uuid("GPU-ffff"),)])
def test_a_wish_that_names_nothing_keeps_the_list_and_says_so(wish: tuple[Selector, ...]) -> None:
    """Nobody trains on the CPU for days because of a typing error."""
    made = plan(layer("project", {"visible_devices": wish}))
    assert made.visible == "0,1,2,3"
    assert codes(made) == ["no-overlap"]
    assert made.findings[0].severity == "error"


def test_a_wish_that_names_too_much_keeps_what_there_is() -> None:
    """[0, 9] on four cards is [0], with a warning."""
    made = plan(layer("project", {"visible_devices": at(0, 9)}))
    assert (made.visible, codes(made)) == ("0", ["no-such-device"])


def test_none_is_honoured() -> None:
    """`visible_devices = "none"` means it, without a finding."""
    made = plan(layer("project", {"visible_devices": ()}))
    assert (made.visible, made.devices, made.findings) == (NO_GPU, (), ())


def test_all_changes_nothing() -> None:
    """ "all" and no word on visibility leave CUDA_VISIBLE_DEVICES alone."""
    assert plan(layer("project", {"visible_devices": "all"})).visible is None
    assert plan(layer("project", {"memory_growth": True})).visible is None


def test_the_fewest_devices_hold() -> None:
    """The smallest max_devices of all layers cuts the list, and the record says so."""
    made = plan(layer("machine", ceiling={"max_devices": 3}), layer("project", ceiling={"max_devices": 2}))
    assert made.visible == "0,1"
    assert "clamped" in codes(made)
    assert plan(layer("machine", ceiling={"max_devices": 2}), inventory=BLIND).visible == "0,1"


def test_the_grant_and_the_administrator_may_leave_nothing_together() -> None:
    """A grant of GPU 0 where GPU 1 is allowed gives neither: no GPU, loudly."""
    made = plan(layer("machine", ceiling={"allowed_devices": at(1)}), grant=Grant(("0",), pci_order=True))
    assert (made.visible, codes(made)) == (NO_GPU, ["no-overlap"])


def test_what_the_administrator_allows_by_name_needs_nvml_and_says_so() -> None:
    """Without NVML nobody knows which cards are meant: no GPU, and the reason is not the grant."""
    by_name = layer("machine", ceiling={"allowed_devices": (name("*A100*"),)})
    made = plan(by_name, inventory=BLIND)
    assert (made.visible, codes(made)) == (NO_GPU, ["no-inventory"])
    by_uuid = layer("machine", ceiling={"allowed_devices": (uuid("GPU-00000001"),)})
    assert codes(plan(by_uuid, grant=Grant(("1",)), inventory=BLIND)) == ["no-inventory"]


def test_require_grant_means_no_gpu_in_a_job_without_one() -> None:
    """Inside a scheduler's job an unset CUDA_VISIBLE_DEVICES means none; outside of one, all."""
    machine = layer("machine", ceiling={"require_grant": True})
    assert plan(machine, grant=Grant(scheduler=True)).visible == NO_GPU
    assert plan(machine, grant=Grant(("1",), scheduler=True)).visible == "1"
    assert plan(machine).visible == "0,1,2,3"


CHOOSING = (
    layer("machine", ceiling={"allowed_devices": at(1, 2, 3)}),
    layer("user", {"visible_devices": AutoChoice(2, when_busy="share")}),
)


def test_an_automatic_choice_leaves_the_candidates_until_the_places_are_known() -> None:
    """`{count = 2}` shows all allowed cards before the choice, and those of the seats after it."""
    made = plan(*CHOOSING)
    assert (made.visible, codes(made)) == ("1,2,3", [])
    assert made.choosing == AutoChoice(2, when_busy="share")
    chosen = plan(*CHOOSING, allocations=(Allocation(CARDS[3].uuid), Allocation(CARDS[1].uuid)))
    assert (chosen.visible, chosen.choosing) == ("1,3", None)


def test_a_seat_outside_the_candidates_widens_nothing() -> None:
    """What somebody chose elsewhere is no way around the ceilings; no seat is no GPU."""
    assert plan(*CHOOSING, allocations=(Allocation(CARDS[0].uuid), Allocation(CARDS[1].uuid))).visible == "1"
    assert plan(*CHOOSING, allocations=()).visible == NO_GPU


def test_ceilings_bound_how_many_are_chosen_not_which() -> None:
    """`max_devices = 1` beside `{count = 2}`: one of all the candidates, and a clamp that names the ceiling."""
    made = plan(*CHOOSING, layer("project", ceiling={"max_devices": 1}))
    assert (made.visible, codes(made)) == ("1", ["clamped"]), "who opens CUDA before the choice sees no more than that"
    assert [device.token for device in made.devices or ()] == ["1", "2", "3"]
    assert made.choosing is not None
    assert made.choosing.count == 1
    assert "project" not in (made.findings[0].path or "")
    few = plan(layer("machine", ceiling={"allowed_devices": at(2)}), CHOOSING[1])
    assert (few.visible, codes(few)) == ("2", ["clamped"])
    assert plan(CHOOSING[1], layer("machine", ceiling={"max_devices": 0})).visible == NO_GPU


def test_the_program_narrows_the_candidates() -> None:
    """CUDA_VISIBLE_DEVICES of the program's own leaves those cards to choose from; a wish for the CPU is kept."""
    assert plan(*CHOOSING, request="3,2,0").visible == "3,2"
    assert plan(*CHOOSING, request="").choosing is None


def test_without_nvml_an_automatic_choice_waits_for_whoever_can_tell() -> None:
    """Nothing is written before the first listing; then the first ones are taken by their numbers."""
    alone = CHOOSING[1]
    assert plan(alone, inventory=BLIND).visible is None
    assert plan(alone, inventory=BLIND, allocations=(Allocation("0"), Allocation("1"))).visible == "0,1"
    granted = plan(alone, inventory=BLIND, grant=Grant(("3", "1", "2")), allocations=(Allocation("3"), Allocation("1")))
    assert granted.visible == "3,1"


def test_each_rank_takes_its_own_place() -> None:
    """Local ranks spread over the list; more ranks than cards share, with a finding."""
    project = layer("project", {"visible_devices": RankChoice()})
    assert [plan(project, grant=Grant(rank=rank)).visible for rank in range(4)] == ["0", "1", "2", "3"]
    assert plan(project).visible == "0,1,2,3"
    assert codes(plan(project, grant=Grant(("3",), rank=1))) == ["more-ranks-than-gpus"]


# ---- what the program asks


def test_the_program_may_narrow() -> None:
    """CUDA_VISIBLE_DEVICES set by the script is intersected with the policy, in the script's order."""
    project = layer("project", {"visible_devices": at(0, 1, 2)})
    assert plan(project, request="2,1").visible == "2,1"
    assert plan(project, request="").visible == NO_GPU
    assert plan(project, request="-1").visible == NO_GPU


def test_the_program_may_not_widen() -> None:
    """A wish beyond the list is cut to the list, one that leaves nothing keeps it."""
    project = layer("project", {"visible_devices": at(1, 2)})
    wider = plan(project, request="0,1,3")
    assert (wider.visible, codes(wider)) == ("1", ["clamped"])
    elsewhere = plan(project, request="0")
    assert (elsewhere.visible, codes(elsewhere)) == ("1,2", ["no-overlap"])


def test_the_program_chooses_before_devices_are_counted() -> None:
    """Under max_devices = 1 a script that names GPU 2 gets GPU 2, not nothing."""
    assert plan(layer("machine", ceiling={"max_devices": 1}), request="2").visible == "2"


def test_a_policy_without_a_word_on_visibility_leaves_the_programs_list() -> None:
    """Only growth is declared: whatever the program writes stays."""
    made = plan(layer("project", {"memory_growth": True}), grant=Grant(("0",), pci_order=True), request="3")
    assert made.visible is None
    assert devices_of(made) == [CARDS[3]]


def test_nvml_is_asked_only_where_visibility_needs_it() -> None:
    """Positions need no NVML; names do, and numbers beside UUIDs do."""

    def needs(*made: Layer, grant: Grant = FREE, request: tuple[str, ...] | None = None) -> bool:
        return needs_inventory(merge(made, SUBJECT), grant, request)

    by_position = layer("project", {"visible_devices": at(0, 1)})
    assert not needs(by_position)
    assert not needs(by_position, grant=Grant((CARDS[0].uuid,)))
    assert needs(layer("project", {"visible_devices": (name("*"),)}))
    assert needs(layer("machine", ceiling={"allowed_devices": at(0)}), grant=Grant((CARDS[0].uuid,)))
    assert needs(layer("project", {"visible_devices": (uuid("GPU-1"),)}), request=("0",))


# ---- who asked, and what held


def test_a_clamp_names_the_key_that_took_the_gpu_away() -> None:
    """GPU 0 is the administrator's to give, GPU 1 the project's: each wish names the one that held, or the grant."""
    machine = layer("machine", ceiling={"allowed_devices": at(1, 2, 3)})
    project = layer("project", {"visible_devices": at(1, 2)})
    (outside,) = plan(machine, project, request="0,2").findings
    assert (outside.path, outside.key, outside.asked_by) == (PATHS["machine"], "ceiling.allowed_devices", PROGRAM)
    (other,) = plan(machine, project, request="1,2").findings
    assert (other.path, other.key) == (PATHS["project"], "gpu.visible_devices")
    assert other.held_by == f"{PATHS['project']} (gpu.visible_devices)"
    (granted,) = plan(machine, grant=Grant(("1", "2"), pci_order=True), request="3,2").findings
    assert (granted.path, granted.held_by) == (None, "the grant (1,2)")


def test_a_wish_that_leaves_nothing_names_what_held() -> None:
    """A file's and the program's wish for GPU 0 alone keep the list, and say which ceiling forbids it."""
    machine = layer("machine", ceiling={"allowed_devices": at(1, 2)})
    by_file = plan(machine, layer("user", {"visible_devices": (uuid("GPU-00000000"),)})).findings[0]
    by_program = plan(machine, request="0").findings[0]
    assert [by_file.code, by_program.code] == ["no-overlap", "no-overlap"]
    assert [by_file.asked_by, by_program.asked_by] == [f"{PATHS['user']} (gpu.visible_devices)", PROGRAM]
    for finding in (by_file, by_program):
        assert finding.held_by == f"{PATHS['machine']} (ceiling.allowed_devices)"
        assert str(finding.held_by) in finding.message


def test_the_smallest_count_names_who_asked_for_more() -> None:
    """Of several `max_devices` the smallest holds and is named, once."""
    machine, user = layer("machine", ceiling={"max_devices": 3}), layer("user", ceiling={"max_devices": 1})
    (finding,) = plan(machine, user, layer("project", {"visible_devices": at(0, 1)})).findings
    assert (finding.path, finding.asked_by) == (PATHS["user"], f"{PATHS['project']} (gpu.visible_devices)")
    assert plan(machine, user, request="1,2").findings[0].asked_by == PROGRAM
    assert plan(machine, user).findings[0].asked_by is None


# ---- every rank on one card

ONE_CARD = {
    "a list of one": layer("project", {"visible_devices": at(0)}),
    "one device for everybody": layer("machine", ceiling={"max_devices": 1}),
    "one allowed device of a user": layer("user", ceiling={"allowed_devices": at(2)}),
}


@pytest.mark.parametrize("made", ONE_CARD.values(), ids=ONE_CARD)
@pytest.mark.parametrize("inventory", [INVENTORY, BLIND], ids=["nvml", "blind"])
def test_a_list_of_one_never_piles_all_ranks_on_one_card_silently(made: Layer, inventory: Inventory) -> None:
    """From the second local rank on a warning says that all share a GPU, and what would spread them."""
    piled = plan(made, grant=Grant(rank=1), inventory=inventory)
    (finding,) = [finding for finding in piled.findings if finding.code == "ranks-share-a-gpu"]
    assert finding.severity == "warning"
    assert 'rank = "auto"' in finding.message
    assert finding.path in PATHS.values()
    for rank in (None, 0):
        assert "ranks-share-a-gpu" not in codes(plan(made, grant=Grant(rank=rank), inventory=inventory))


def test_ranks_that_have_gpus_of_their_own_are_not_warned() -> None:
    """A grant of one GPU per rank, a list of several, and a program that chose by itself pile up nothing."""
    project = layer("project", {"visible_devices": at(0)})
    assert codes(plan(project, grant=Grant(("3",), rank=1))) == []
    assert codes(plan(layer("project", {"visible_devices": at(0, 1)}), grant=Grant(rank=1))) == []
    assert codes(plan(layer("machine", ceiling={"max_devices": 1}), grant=Grant(rank=1), request="1")) == []
    assert codes(plan(grant=Grant(rank=1))) == []


def test_a_rank_that_was_granted_one_gpu_may_have_it_for_itself() -> None:
    """`srun --gpus-per-task=1` gives each rank one: that it is not shared cannot be told, so it is no error."""
    project = layer("project", {"visible_devices": RankChoice()})
    assert plan(project, grant=Grant(("3",), rank=1)).findings[0].severity == "warning"
    assert plan(project, grant=Grant(("2", "3"), rank=2)).findings[0].severity == "error"
