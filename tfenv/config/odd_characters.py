"""Names characters that look like others, or like nothing: word processors, web pages and chats put them into files."""

from __future__ import annotations

#: What to write instead of them. The compatibility form of Unicode tells it of all others.
_MEANT = {
    "\u2010": "-",
    "\u2011": "-",
    "\u2012": "-",
    "\u2013": "-",
    "\u2014": "-",
    "\u2015": "-",
    "\u2212": "-",
    "\u2018": "'",
    "\u2019": "'",
    "\u201a": "'",
    "\u201b": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u201e": '"',
    "\u201f": '"',
    "\u00ab": '"',
    "\u00bb": '"',
}


def describe_odd_character(character: str) -> str | None:
    """Return which character this is, and what to write in its place. None: it is what it looks like."""
    if character == "" or character.isascii():
        return None
    # Late: only a message about a mistake needs it.
    import unicodedata

    category = unicodedata.category(character)
    meant = _MEANT.get(character) or unicodedata.normalize("NFKC", character)
    if category in ("Zs", "Zl", "Zp"):
        fix = "write a normal space"
    elif category == "Cf":
        fix = "remove it"
    elif len(meant) == 1 and meant.isascii():
        fix = f"write {meant}"
    else:
        return None
    name = unicodedata.name(character, "").lower()
    if character == "\ufeff":
        name = "byte order mark"
    return f'this is U+{ord(character):04X} "{name}": {fix}'


def describe_odd_text(text: str) -> str | None:
    """Return what is said of the first such character in a text. None: there is none."""
    found = (describe_odd_character(character) for character in text)
    first = next((described for described in found if described is not None), None)
    return None if first is None else first.replace("this is", "it contains", 1)
