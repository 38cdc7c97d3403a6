"""Positions of keys, compared with what tomli parses from the same text."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from tfenv.config.positions import locate_keys
from tfenv.policy.model import KeyPath


def list_paths(value: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    """List the path of every key and every array element in parsed TOML."""
    children: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    for key, child in children:
        yield (*path, key)
        yield from list_paths(child, (*path, key))


def remove_indent(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


def test_a_policy_has_a_position_for_every_key() -> None:
    """Headers, keys, array elements, inline tables and arrays of tables each have their own line and column."""
    text = remove_indent(
        """
        # a comment with [brackets] = "and quotes
        on_error = "warn"
        [gpu]
        visible_devices = [0, "GPU-89",  # first
            'name:*A100*',
        ]
        auto = {count = 1, min.free = "6GiB"}
        [[gpu.device]]
        match = "a"
        [[gpu.device]]
          match = "b"
        [project."/srv/a.b".gpu]
        memory_limit = "50%"
        """
    )
    assert locate_keys(text) == {
        ("on_error",): (2, 1),
        ("gpu",): (3, 2),
        ("gpu", "visible_devices"): (4, 1),
        ("gpu", "visible_devices", 0): (4, 20),
        ("gpu", "visible_devices", 1): (4, 23),
        ("gpu", "visible_devices", 2): (5, 5),
        ("gpu", "auto"): (7, 1),
        ("gpu", "auto", "count"): (7, 9),
        ("gpu", "auto", "min"): (7, 20),
        ("gpu", "auto", "min", "free"): (7, 24),
        ("gpu", "device"): (8, 7),
        ("gpu", "device", 0): (8, 7),
        ("gpu", "device", 0, "match"): (9, 1),
        ("gpu", "device", 1): (10, 7),
        ("gpu", "device", 1, "match"): (11, 3),
        ("project",): (12, 2),
        ("project", "/srv/a.b"): (12, 10),
        ("project", "/srv/a.b", "gpu"): (12, 21),
        ("project", "/srv/a.b", "gpu", "memory_limit"): (13, 1),
    }


def test_a_table_stands_where_its_own_header_is() -> None:
    """A table first named inside a longer header gets the position of its own header when that comes."""
    found = locate_keys("[a.b.c]\nx = 1\n[a]\ny = 2\n")
    assert found["a",] == (3, 2)
    assert found["a", "b"] == (1, 4)


def test_keys_below_an_array_of_tables_belong_to_its_last_element() -> None:
    """`[a.b]` and `[[a.c]]` after the second `[[a]]` are inside a[1]."""
    found = locate_keys("[[a]]\n[[a.c]]\n[[a.c]]\n[[a]]\n[a.b]\nx = 1\n[[a.c]]\n")
    assert found["a", 1, "b", "x"] == (6, 1)
    assert found["a", 0, "c", 1] == (3, 5)
    assert found["a", 1, "c", 0] == (7, 5)
    assert ("a", 1, "c", 1) not in found


@pytest.mark.parametrize(
    "value",
    [
        '"a # no comment ] } ="',
        r'"quote \" and backslash \\"',
        "'C:\\path\\'",
        '"""\nlines\n[not.a.header]\nk = 1 \\\n  "quoted" ""two""\\"""\n"""',
        '"""ends in two quotes"""""',
        "'''\nlines ''two'' # no\n[x]\n'''",
        "'''ends in one quote''''",
        '""""""',
        "1979-05-27 07:32:00",
        "1979-05-27T00:32:00.999999-07:00",
        "07:32",
        "-inf",
        "+1_000.5e-3",
        "0xDEAD_beef",
        "true",
        "[[1, [2, 'x]']], [\n# ]\n3,\n], [], {}]",
        "{ a.b = 1, 'c' = {d = [{e = 2}, {}]} }",
        "{\n  a = 1, # comment, }\n  b = 2,\n}",
    ],
)
def test_the_key_after_any_value_is_found(value: str) -> None:
    """The end of every kind of value is known: the next key's line is right, and no key is made up."""
    text = f"before = {value} # end\r\nafter = 1\n"
    found = locate_keys(text)
    assert set(found) == set(list_paths(tomli.loads(text)))
    assert found["after",] == (text.count("\n"), 1)


def test_escapes_in_quoted_keys_are_undone() -> None:
    """A key is the same whether it is written plainly or by escapes, those of TOML 1.1 too."""
    text = '"\\u0061\\U00000062\\x63\\t\\e\\"\\\\" = 1\n"é ü" . \'x"y\' = 2\n'
    assert set(locate_keys(text)) == set(list_paths(tomli.loads(text)))


def test_columns_count_characters() -> None:
    """An umlaut, an emoji and a tab are one column each."""
    assert locate_keys('\t"ü😀" = {k = 1}')["ü😀", "k"] == (1, 10)


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    """A hundred thousand brackets are scanned without recursion."""
    assert ("a", 0, 0) in locate_keys("a = " + "[" * 100_000)
    assert ("a", "b", "b") in locate_keys("a = " + "{b=" * 100_000)


def test_long_keys_cost_little_and_hide_nothing() -> None:
    """Keys of a thousand parts get positions for the first levels only. What follows them has its own."""
    text = "".join(f"k{line}" + ".x" * 1_000 + " = 1\n" for line in range(100)) + "[gpu]\nafter = 1\n"
    found = locate_keys(text)
    assert found["k99", "x"] == (100, 5)
    assert found["gpu", "after"] == (102, 1)
    assert max(map(len, found)) < 100


@pytest.mark.parametrize("text", ["[", "[[", "[a", "a", "a =", "a = [", 'a = "', "= 1", "]", "}", "a = 'x", "[]", "\0"])
def test_what_is_not_toml_ends_the_scan(text: str) -> None:
    """Positions before a syntax error stay known, and nothing is raised."""
    assert locate_keys("first = 1\n" + text)["first",] == (1, 1)


# ---- laws

KEYS = ["a", "b", "c-d", "1", '"a"', "'b'", '"x.y"', "'#'", '"\\u00e9 ]"', '""', '"\\""', "' = '"]
SCALARS = [
    *["1", "-2.5", "true", "1979-05-27", "1979-05-27 07:32:00Z", "07:32:00", "0b1", "inf"],
    *['""', '"]"', '"\\""', "'#'", '"""\n]"""', "'''\n}'''", '"""a"""""', '"""\\"""" """', "''''''"],
]
BLANKS = st.sampled_from(["", " ", "\t", "  "])
BREAKS = st.sampled_from(["", " ", "\n", ' # ] } = "\n', "\r\n\t"])

dotted_keys = st.builds(
    lambda parts, blank: f"{blank}.{blank}".join(parts), st.lists(st.sampled_from(KEYS), min_size=1, max_size=3), BLANKS
)


def write_in_brackets(opening: str, closing: str, items: list[str], blank: str, trailing: bool) -> str:
    comma = "," if trailing and items else ""
    return opening + blank + f"{blank},{blank}".join(items) + blank + comma + blank + closing


def make_arrays(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    items = st.lists(values, max_size=3)
    return st.builds(write_in_brackets, st.just("["), st.just("]"), items, BREAKS, st.booleans())


def make_inline_tables(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.builds(lambda key, blank, value: f"{key}{blank}={blank}{value}", dotted_keys, BLANKS, values)
    return st.builds(write_in_brackets, st.just("{"), st.just("}"), st.lists(pair, max_size=3), BREAKS, st.booleans())


values = st.recursive(
    st.sampled_from(SCALARS), lambda inner: make_arrays(inner) | make_inline_tables(inner), max_leaves=6
)
ends = st.sampled_from(["\n", " # comment [x]\n", "\r\n", "\n\n"])
statements = st.one_of(
    st.builds(lambda blank, key, value, end: f"{blank}{key}={blank}{value}{end}", BLANKS, dotted_keys, values, ends),
    st.builds(lambda blank, key, end: f"[{blank}{key}{blank}]{end}", BLANKS, dotted_keys, ends),
    st.builds(lambda blank, key, end: f"{blank}[[{key}]]{end}", BLANKS, dotted_keys, ends),
)


def keep_accepted(candidates: list[str]) -> str:
    """Return as many of the statements, in order, as make valid TOML together."""
    text = ""
    for statement in candidates:
        with contextlib.suppress(tomli.TOMLDecodeError):
            tomli.loads(text + statement)
            text += statement
    return text


def is_key_first(text: str, key: str) -> bool:
    """Return whether a text begins with this key, bare or quoted."""
    for end in range(1, min(len(text), 20) + 1):
        with contextlib.suppress(tomli.TOMLDecodeError):
            if tomli.loads(text[:end] + " = 1") == {key: 1}:
                return True
    return False


@given(st.lists(statements, max_size=12))
def test_every_key_of_valid_toml_has_a_position_and_nothing_else_has(candidates: list[str]) -> None:
    """The scanner's keys are exactly tomli's, and at each position stands that key."""
    text = keep_accepted(candidates)
    found = locate_keys(text)
    assert set(found) == set(list_paths(tomli.loads(text)))
    lines = text.split("\n")
    for path, (line, column) in found.items():
        rest = lines[line - 1][column - 1 :]
        assert rest
        if isinstance(path[-1], str):
            assert is_key_first(rest, path[-1])


@given(st.text(alphabet="ab.=[]{},#\"'\\\n\r\t 1-:xuU\0é", max_size=60))
def test_no_text_makes_it_raise(text: str) -> None:
    """Any text gives positions. What tomli accepts gives exactly its keys."""
    found = locate_keys(text)
    with contextlib.suppress(tomli.TOMLDecodeError):
        assert set(found) == set(list_paths(tomli.loads(text)))
