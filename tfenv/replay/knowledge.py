"""What the records of a log tell of GPUs, for those records that do not say it themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

from tfenv.audit.query import LoggedRecord, list_logged_devices

#: More bytes than this are no card's.
_MOST_BYTES = 1 << 50
#: Digits of the number of a card.
_LONGEST_NUMBER = 4
#: Beyond that nothing is remembered of further cards.
_MOST_CARDS = 100_000


def read_size(value: object) -> int | None:
    """Return bytes of a card. None: it is no such number."""
    return value if type(value) is int and 0 <= value <= _MOST_BYTES else None


@dataclass
class Knowledge:
    """GPUs by UUID.

    Attributes:
        totals: Their memory in bytes.
        numbers: Their numbers on the machine, as nvidia-smi shows them.
        doubtful: UUIDs of which records say different things. They are in none of the others.
    """

    totals: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)

    def learn(self, record: LoggedRecord) -> None:
        """Remember what a record tells of GPUs.

        Where no GPUs were granted, the tokens that tfenv wrote are the machine's numbers. Otherwise CUDA or a scheduler
        may have counted in another order.
        """
        is_own_count = "grant" in record and record["grant"] is None
        for device in list_logged_devices(record):
            uuid, token, total = device.get("uuid"), device.get("token"), read_size(device.get("total_bytes"))
            if not isinstance(uuid, str) or len(self.totals) + len(self.numbers) >= 2 * _MOST_CARDS:
                continue
            if total is not None:
                self._add(self.totals, uuid, total)
            if is_own_count and isinstance(token, str) and _is_number(token):
                self._add(self.numbers, uuid, int(token))

    def add(self, other: Knowledge) -> None:
        """Remember what others learned."""
        for uuid in other.doubtful:
            self._forget(uuid)
        for uuid, total in other.totals.items():
            self._add(self.totals, uuid, total)
        for uuid, number in other.numbers.items():
            self._add(self.numbers, uuid, number)

    def _add(self, known: dict[str, int], uuid: str, value: int) -> None:
        if uuid not in self.doubtful and known.setdefault(uuid, value) != value:
            self._forget(uuid)

    def _forget(self, uuid: str) -> None:
        self.doubtful.add(uuid)
        self.totals.pop(uuid, None)
        self.numbers.pop(uuid, None)


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit() and len(token) <= _LONGEST_NUMBER
