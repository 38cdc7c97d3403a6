"""Remarks on tables under `[observe]` that would change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tfenv.lint.reach import KeyPositions, LintRemark
from tfenv.policy.merge import merge_groups
from tfenv.policy.model import Layer, Tables


def advise_on_observed(parts: Sequence[Layer], positions: KeyPositions) -> Iterator[LintRemark]:
    """Say which keys under `[observe]` have the value that the same table has in force.

    Args:
        parts: The files of one layer, validated.
        positions: For the line of the value in force.
    """
    for part in parts:
        if part.observed is not None:
            for now, tried in _pair_tables(part, part.observed):
                yield from _compare(now, tried, positions)


def _pair_tables(layer: Layer, observed: Layer) -> Iterator[tuple[Tables, Tables]]:
    """Yield each observed table with the one of the same file that it stands for."""
    yield layer.base, observed.base
    pairs: Iterable[tuple[Mapping[str, Tables], Mapping[str, Tables]]] = (
        (merge_groups(layer), merge_groups(observed)),
        (layer.users, observed.users),
        (layer.projects, observed.projects),
    )
    for now, tried in pairs:
        yield from ((now[name], tables) for name, tables in tried.items() if name in now)


def _compare(now: Tables, tried: Tables, positions: KeyPositions) -> Iterator[LintRemark]:
    for in_force, observed in ((now.gpu, tried.gpu), (now.ceiling, tried.ceiling)):
        for key, setting in observed.items():
            if key in in_force and in_force[key].value == setting.value:
                where = positions.describe(in_force[key].origin, setting.origin)
                message = f"changes nothing, for {where} has this value in force; remove it"
                yield LintRemark(setting.origin, "nothing-to-observe", message, "note")
