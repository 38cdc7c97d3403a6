"""The clamp alone: whatever a ConfigProto says, TensorFlow gets one that keeps the limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tfenv.frameworks.tensorflow.config_proto import Ledger, PolicyGpu, PolicyView, clamp, make_view
from tfenv.policy.model import Device, MemoryLimit, Plan, PlannedDevice

config_pb2 = pytest.importorskip("tensorflow.core.protobuf.config_pb2")
pytestmark = [pytest.mark.tensorflow, pytest.mark.matrix]

MIB = 1 << 20
GIB = 1 << 30


# ---- what TensorFlow makes of a message: BaseGPUDeviceFactory::CreateDevices in gpu_device.cc


class Refused(Exception):
    """TensorFlow raises an error."""


def listed_ordinals(config: Any, usable: list[int]) -> list[int]:
    """ParseVisibleDeviceList."""
    text = config.gpu_options.visible_device_list
    if not text:
        return list(range(max(usable, default=-1) + 1))
    try:
        ordinals = [int(entry) for entry in text.split(",")]
    except ValueError:
        raise Refused from None
    if len(set(ordinals)) < len(ordinals) or not all(0 <= ordinal <= max(usable, default=-1) for ordinal in ordinals):
        raise Refused
    return ordinals


def tensorflow_takes(config: Any, totals: dict[int, int]) -> dict[int, float]:
    """Bytes that the allocators of each GPU may take, by ordinal.

    Args:
        config: As TensorFlow gets it.
        totals: The memory of the cards TensorFlow can use, by ordinal.
    """
    options = config.gpu_options
    most = config.device_count.get("GPU", 1 << 31)
    most = 1 << 31 if most < 0 else most
    if most == 0 or not totals:
        return {}
    order = listed_ordinals(config, list(totals))
    valid = [ordinal for ordinal in order if ordinal in totals]
    entries = options.experimental.virtual_devices
    count = min(most, len(valid))
    if entries:
        if count < len(entries) or len(valid) != len(entries):
            raise Refused
        if options.visible_device_list and len(order) != len(entries):
            raise Refused
        count = len(entries)
    taken = {}
    for position, ordinal in enumerate(valid[:count]):
        sizes = entries[position].memory_limit_mb if entries else []
        if options.experimental.use_cuda_malloc_async or options.experimental.use_unified_memory:
            taken[ordinal] = float("inf")
        elif sizes:
            taken[ordinal] = sum(int(size) for size in sizes) * float(MIB)
        else:
            taken[ordinal] = (options.per_process_gpu_memory_fraction or 1.0) * totals[ordinal]
    return taken


# ---- random messages, random policies


@dataclass(frozen=True)
class Card:
    """A GPU TensorFlow can use; `known`: NVML says how big it is."""

    ordinal: int
    total: int
    known: bool
    limit: MemoryLimit | None
    parts: tuple[MemoryLimit, ...]

    @property
    def bound(self) -> float:
        if self.limit is None or self.limit.unlimited:
            return float("inf")
        return self.total * self.limit.fraction if self.limit.fraction is not None else float(self.limit.bytes or 0)


limits = st.one_of(
    st.none(),
    st.integers(1, 200_000).map(lambda mib: MemoryLimit(bytes=mib * MIB)),
    st.floats(0.001, 1.0).map(lambda part: MemoryLimit(fraction=part)),
)


@st.composite
def cards(draw: st.DrawFn) -> list[Card]:
    """Cards with gaps between their ordinals; splits that fit their limit, as `resolve` makes them."""
    ordinals = sorted(draw(st.sets(st.integers(0, 6), min_size=0, max_size=4)))
    known = draw(st.booleans())
    result = []
    for ordinal in ordinals:
        total = draw(st.sampled_from([8, 24, 80])) * GIB
        limit = draw(limits)
        parts: tuple[MemoryLimit, ...] = ()
        if known and draw(st.booleans()):
            room = (limit.on(total) if limit is not None else None) or total
            parts = (MemoryLimit(bytes=min(room, total) // 3),) * 2
        result.append(Card(ordinal, total, known, limit, parts))
    return result


def view_of(found: list[Card], *, growth: bool) -> PolicyView:
    """The view `make_view` makes of a Plan for these cards."""
    by_ordinal = {card.ordinal: card for card in found}
    planned = []
    for ordinal in range(max(by_ordinal, default=-1) + 1):
        card = by_ordinal.get(ordinal)
        if card is None:
            planned.append(PlannedDevice(token=str(ordinal)))
            continue
        device = Device(ordinal, f"GPU-{ordinal}", "Card", card.total) if card.known else None
        planned.append(PlannedDevice(str(ordinal), device, card.limit, card.parts))
    return make_view(Plan(devices=tuple(planned), growth=growth), list(by_ordinal))


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """Messages as programs write them, the odd ones too."""
    config = config_pb2.ConfigProto()
    options = config.gpu_options
    count = draw(st.one_of(st.none(), st.integers(-1, 6)))
    if count is not None:
        config.device_count["GPU"] = count
    options.visible_device_list = draw(
        st.one_of(
            st.just(""),
            st.lists(st.integers(-1, 7), max_size=4).map(lambda entries: ",".join(map(str, entries))),
            st.permutations([0, 1, 2]).map(lambda entries: ",".join(map(str, entries))),
            st.text("01,x ", max_size=4),
        )
    )
    options.per_process_gpu_memory_fraction = draw(st.sampled_from([0.0, 0.02, 0.4, 1.0, 1.5, 90.0]))
    options.allow_growth = draw(st.booleans())
    experimental = options.experimental
    experimental.use_unified_memory = draw(st.booleans())
    experimental.use_cuda_malloc_async = draw(st.booleans())
    experimental.num_virtual_devices_per_gpu = draw(st.integers(0, 3))
    sizes = st.lists(st.integers(1, 200_000).map(float), max_size=3)
    for entry in draw(st.one_of(st.just([]), st.lists(sizes, max_size=4))):
        experimental.virtual_devices.add().memory_limit_mb.extend(entry)
    return config


def outcome_of(config: Any, totals: dict[int, int]) -> dict[int, float] | None:
    """What TensorFlow takes, None where it refuses."""
    try:
        return tensorflow_takes(config, totals)
    except Refused:
        return None


@given(config=configs(), found=cards(), growth=st.booleans())
def test_no_message_passes_a_limit(config: Any, found: list[Card], growth: bool) -> None:
    """For any ConfigProto and any policy, what TensorFlow may take of a GPU is within that GPU's limit."""
    clamped = clamp(config, view_of(found, growth=growth))
    given_config = config if clamped.config is None else clamped.config
    taken = outcome_of(given_config, {card.ordinal: card.total for card in found})
    for card in found:
        if taken is not None and card.ordinal in taken and card.bound < card.total:
            assert taken[card.ordinal] <= card.bound


@given(config=configs(), found=cards(), growth=st.booleans())
def test_no_message_gets_more_gpus_or_memory_than_it_asked_for(config: Any, found: list[Card], growth: bool) -> None:
    """The clamp narrows: a GPU the program left out stays out, a smaller wish stays smaller.

    A fraction can be compared with a limit in bytes only where NVML knows the card.
    """
    totals = {card.ordinal: card.total for card in found}
    asked = outcome_of(config, totals)
    clamped = clamp(config, view_of(found, growth=growth))
    taken = outcome_of(config if clamped.config is None else clamped.config, totals)
    if asked is None or taken is None:
        return
    assert set(taken) <= set(asked)
    # Of cards of unknown size that are limited in different ways TensorFlow can be given only those of one way.
    assert list(taken) == list(asked) or not all(card.known for card in found)
    for card in found:
        if card.known and card.ordinal in taken:
            assert taken[card.ordinal] <= asked[card.ordinal]


@given(config=configs(), found=cards(), growth=st.booleans())
def test_the_clamp_makes_no_error(config: Any, found: list[Card], growth: bool) -> None:
    """What TensorFlow accepts it also accepts clamped."""
    totals = {card.ordinal: card.total for card in found}
    clamped = clamp(config, view_of(found, growth=growth))
    if outcome_of(config, totals) is not None and clamped.config is not None:
        assert outcome_of(clamped.config, totals) is not None


@given(config=configs(), found=cards())
def test_growth_is_on_in_every_message_that_creates_a_gpu(config: Any, found: list[Card]) -> None:
    """`memory_growth = true` holds whatever the message says."""
    totals = {card.ordinal: card.total for card in found}
    clamped = clamp(config, view_of(found, growth=True))
    given_config = config if clamped.config is None else clamped.config
    if outcome_of(given_config, totals):
        assert given_config.gpu_options.allow_growth


@given(config=configs(), found=cards(), growth=st.booleans())
def test_the_programs_own_message_is_never_changed(config: Any, found: list[Card], growth: bool) -> None:
    """The clamp works on a copy; the clamped message clamps to itself."""
    before = config.SerializeToString(deterministic=True)
    view = view_of(found, growth=growth)
    once = clamp(config, view).config
    assert config.SerializeToString(deterministic=True) == before
    if once is not None and outcome_of(config, {card.ordinal: card.total for card in found}):
        twice = clamp(once, view).config
        assert twice is not None
        assert twice.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


@given(config=configs(), found=cards())
def test_a_message_without_gpus_goes_on_untouched(config: Any, found: list[Card]) -> None:
    """`device_count = {"GPU": 0}` is how programs say "CPU only": nothing is added to it."""
    config.device_count["GPU"] = 0
    assert clamp(config, view_of(found, growth=True)).config is None


@given(config=configs(), found=cards())
def test_a_policy_that_says_nothing_changes_nothing(config: Any, found: list[Card]) -> None:
    """Without growth and limits the message is as it was."""
    bare = [Card(card.ordinal, card.total, card.known, None, ()) for card in found]
    given_config = clamp(config, view_of(bare, growth=False)).config
    assert given_config is None or given_config == config


# ---- several messages in one process


def tensorflow_creates(config: Any, totals: dict[int, int]) -> list[tuple[int, float]]:
    """The logical GPUs of a message by their number: the card of each, and the bytes of its allocator."""
    options = config.gpu_options
    taken = tensorflow_takes(config, totals)
    entries = options.experimental.virtual_devices
    created = []
    for position, (ordinal, whole) in enumerate(taken.items()):
        sizes = entries[position].memory_limit_mb if entries else []
        order = entries[position].device_ordinal if entries else []
        count = max(1, options.experimental.num_virtual_devices_per_gpu)
        parts = [int(size) * float(MIB) for size in sizes] or [whole / count] * count
        created += [(order[part] if part < len(order) else 0, ordinal, size) for part, size in enumerate(parts)]
    return [(ordinal, size) for _, ordinal, size in sorted(created, key=lambda device: device[0])]


@given(messages=st.lists(st.tuples(configs(), st.booleans()), min_size=2, max_size=6), found=cards())
def test_no_sequence_of_messages_passes_a_limit(messages: list[tuple[Any, bool]], found: list[Card]) -> None:
    """Whatever messages follow each other, executed or not, the allocators of a card stay within its limit."""
    totals = {card.ordinal: card.total for card in found}
    view = view_of(found, growth=True)
    ledger = Ledger()
    cards_by_number: dict[int, int] = {}
    allocators: dict[int, float] = {}
    for config, executed in messages:
        result = clamp(config, view, ledger)
        ledger = result.ledger
        try:
            created = tensorflow_creates(config if result.config is None else result.config, totals)
        except Refused:
            continue
        numbered = dict(enumerate(ordinal for ordinal, _ in created))
        if not executed or any(cards_by_number.get(number, card) != card for number, card in numbered.items()):
            continue  # TensorFlow never maps a logical GPU to another card
        cards_by_number |= numbered
        allocators = {number: size for number, (_, size) in enumerate(created)} | allocators
    for card in found:
        if card.limit is not None and (card.bound < card.total or not card.known):
            held = sum(size for number, size in allocators.items() if cards_by_number[number] == card.ordinal)
            assert held <= max(card.bound, 0) + 1e-6 * card.total or card.bound == float("inf")


def test_a_look_and_then_a_split_share_one_limit() -> None:
    """What the first message gave stays given: the split's first part has it, the others have what is left."""
    view = two_cards(MemoryLimit(bytes=1000 * MIB))
    small = config_pb2.ConfigProto()
    small.gpu_options.visible_device_list = "0"
    small.gpu_options.experimental.virtual_devices.add().memory_limit_mb.extend([400])
    split = config_pb2.ConfigProto()
    split.gpu_options.visible_device_list = "0"
    split.gpu_options.experimental.virtual_devices.add().memory_limit_mb.extend([1000, 1000, 1000])
    first = clamp(small, view)
    second = clamp(split, view, first.ledger)
    assert read_sizes(second.config) == [[333.0, 300.0, 300.0]]
    assert "clamped" in {finding.code for finding in second.findings}
    third = clamp(split, view, clamp(config_pb2.ConfigProto(), view).ledger)
    assert read_sizes(third.config) == [[333.0, 0.0, 0.0]]


def test_every_entry_has_as_many_priorities_as_sizes() -> None:
    """A program that gives one of two GPUs a priority has one for each size on both."""
    config = config_pb2.ConfigProto()
    first, _ = (config.gpu_options.experimental.virtual_devices.add() for _ in range(2))
    first.memory_limit_mb.append(500)
    first.priority.append(-1)
    first.device_ordinal.append(1)
    clamped = clamp(config, two_cards(MemoryLimit(bytes=1000 * MIB), parts=(300 * MIB, 500 * MIB))).config
    assert clamped is not None
    entries = clamped.gpu_options.experimental.virtual_devices
    assert [list(entry.priority) for entry in entries] == [[-1], [0, 0]]
    assert [list(entry.device_ordinal) for entry in entries] == [[1], [0, 0]]
    assert read_sizes(clamped) == [[500.0], [300.0, 500.0]]


# ---- single cases


def two_cards(limit: MemoryLimit | None = None, parts: tuple[int, ...] = ()) -> PolicyView:
    planned = tuple(
        PlannedDevice(str(i), Device(i, f"GPU-{i}", "Card", 24 * GIB), limit, tuple(MemoryLimit(p) for p in parts))
        for i in range(2)
    )
    return make_view(Plan(devices=planned, growth=True), [0, 1])


def read_sizes(config: Any) -> list[list[float]]:
    return [list(entry.memory_limit_mb) for entry in config.gpu_options.experimental.virtual_devices]


def test_a_limit_becomes_one_virtual_device_per_gpu() -> None:
    """1000 MiB on both GPUs are two virtual devices of that size, and growth."""
    clamped = clamp(config_pb2.ConfigProto(), two_cards(MemoryLimit(bytes=1000 * MIB)))
    assert clamped.config is not None
    assert read_sizes(clamped.config) == [[1000.0], [1000.0]]
    assert clamped.config.gpu_options.allow_growth


def test_a_percentage_becomes_a_fraction() -> None:
    """TensorFlow knows fractions by itself: 40 % need no virtual devices."""
    clamped = clamp(config_pb2.ConfigProto(), two_cards(MemoryLimit(fraction=0.4)))
    assert clamped.config is not None
    assert clamped.config.gpu_options.per_process_gpu_memory_fraction == 0.4
    assert read_sizes(clamped.config) == []


def test_a_split_is_scaled_down_with_its_priorities() -> None:
    """A split of 4000 + 6000 MiB under 1000 becomes 400 + 600, priorities and ordinals kept."""
    config = config_pb2.ConfigProto()
    for _ in range(2):
        entry = config.gpu_options.experimental.virtual_devices.add()
        entry.memory_limit_mb.extend([4000, 6000])
        entry.priority.extend([0, -1])
        entry.device_ordinal.extend([3, 4])
    clamped = clamp(config, two_cards(MemoryLimit(bytes=1000 * MIB)))
    assert clamped.config is not None
    assert read_sizes(clamped.config) == [[400.0, 600.0]] * 2
    for entry in clamped.config.gpu_options.experimental.virtual_devices:
        assert list(entry.priority) == [0, -1]
        assert list(entry.device_ordinal) == [3, 4]


def test_a_limit_the_card_cannot_reach_leaves_no_entry() -> None:
    """Under a limit above the card a program sees the size TensorFlow reports by itself."""
    clamped = clamp(config_pb2.ConfigProto(), two_cards(MemoryLimit(bytes=80 * GIB)))
    assert clamped.config is not None
    assert read_sizes(clamped.config) == []
    assert clamped.config.gpu_options.per_process_gpu_memory_fraction == 0


def test_the_policys_split_holds_where_the_program_has_none() -> None:
    """`logical_devices` become the parts of each GPU."""
    view = two_cards(MemoryLimit(bytes=1000 * MIB), parts=(300 * MIB, 500 * MIB))
    clamped = clamp(config_pb2.ConfigProto(), view)
    assert clamped.config is not None
    assert read_sizes(clamped.config) == [[300.0, 500.0]] * 2


@example(count=0)
@given(count=st.integers(0, 2))
def test_cpu_only_hides_every_gpu(count: int) -> None:
    """`on_error = "cpu"` sets device_count to 0, whatever was asked."""
    config = config_pb2.ConfigProto()
    config.device_count["GPU"] = count
    clamped = clamp(config, PolicyView((PolicyGpu(0, PlannedDevice("0")),), cpu_only=True))
    assert (clamped.config or config).device_count["GPU"] == 0


def test_managed_memory_is_no_limit_on_record() -> None:
    """A fraction of 1.5 that no limit of ours holds stays the program's, and is not taken for a limit."""
    config = config_pb2.ConfigProto()
    config.gpu_options.per_process_gpu_memory_fraction = 1.5
    clamped = clamp(config, two_cards(None))
    assert clamped.asked["per_process_gpu_memory_fraction"] == 1.5
    assert [device.fraction for device in clamped.devices] == [None, None]
