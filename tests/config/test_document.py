"""Reading one file: what it is, whose it is, what it says, and where."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfenv.config.document import LARGEST, Document, DocumentError, Trust, read
from tfenv.errors import Finding, escape_for_terminal
from tfenv.policy.model import LayerName, Source

ME = os.getuid()
REPOSITORY = Path(__file__).parents[2]
STRANGER = 65534
POLICY = '[gpu]\nmemory_limit = "8GiB"\n'
needs_root = pytest.mark.skipif(ME != 0, reason="only root can give files to somebody else")


def make_source(path: Path, start_owner: int | None = None) -> Source:
    return Source("project", str(path), start_owner=start_owner)


def read_refused(source: Source, trust: Trust | None = None) -> Finding:
    """Return the finding that reading this file gives."""
    with pytest.raises(DocumentError) as caught:
        read(source, trust or Trust(ME))
    assert caught.value.finding.path == source.path
    planted = caught.value.finding.code == "untrusted-owner"
    assert caught.value.finding.severity == ("warning" if planted else "error")
    return caught.value.finding


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tfgpu.toml"
    path.write_text(POLICY)
    return path


# ---- what a good file gives


def test_a_file_gives_its_data_digest_and_owner(file: Path) -> None:
    """A readable file of one's own becomes a Document. The digest is that of the bytes read."""
    document = read(make_source(file), Trust(ME))
    assert document.data == {"gpu": {"memory_limit": "8GiB"}}
    assert document.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert document.owner == ME
    assert document.text == POLICY


def test_the_text_of_a_command_line_needs_no_file() -> None:
    """Layer "run" is parsed from its text and has no owner."""
    document = read(Source("run", "<tfgpu run>", text=POLICY), Trust(ME))
    assert document.data == {"gpu": {"memory_limit": "8GiB"}}
    assert document.owner is None


def test_positions_are_one_based_and_fall_back_to_the_parent(file: Path) -> None:
    """A key has the line and column it is written at. A missing one those of the nearest table that is there."""
    document = read(make_source(file), Trust(ME))
    assert document.find_position(("gpu", "memory_limit")) == (2, 1)
    assert document.find_position(("gpu", "visible_devices", 0)) == (1, 2)
    assert document.find_position(("ceiling",)) is None


def test_a_pyproject_is_read_at_its_own_table(tmp_path: Path) -> None:
    """Data and positions of a pyproject.toml start at [tool.tfgpu]."""
    path = tmp_path / "pyproject.toml"
    path.write_text('[project]\nname = "x"\n[tool.tfgpu.gpu]\nmemory_growth = true\n')
    document = read(Source("project", str(path), table=("tool", "tfgpu")), Trust(ME))
    assert document.data == {"gpu": {"memory_growth": True}}
    assert document.find_position(("gpu", "memory_growth")) == (4, 1)


def test_a_pyproject_named_by_the_user_must_have_the_table(tmp_path: Path) -> None:
    """TFGPU_CONFIG=pyproject.toml without [tool.tfgpu] is a finding, not an empty policy."""
    path = tmp_path / "pyproject.toml"
    path.write_text('[project]\nname = "x"\n')
    assert read(Source("project", str(path), table=("tool", "tfgpu")), Trust(ME)).data == {}
    finding = read_refused(Source("project", str(path), table=("tool", "tfgpu"), required=True))
    assert finding.code == "not-found"
    assert "[tool.tfgpu]" in finding.message


def test_a_table_that_is_a_value_is_refused(tmp_path: Path) -> None:
    """`tfgpu = 1` under [tool] is no policy."""
    path = tmp_path / "pyproject.toml"
    path.write_text("[tool]\ntfgpu = 1\n")
    assert read_refused(Source("project", str(path), table=("tool", "tfgpu"))).code == "wrong-type"


# ---- kinds of files


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """A file that is gone by the time it is read is a finding."""
    assert read_refused(make_source(tmp_path / "tfgpu.toml")).code == "not-found"
    assert read_refused(Source("project", "/nul\0byte")).code == "not-found"


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    """A directory named tfgpu.toml is refused by name."""
    (tmp_path / "tfgpu.toml").mkdir()
    finding = read_refused(make_source(tmp_path / "tfgpu.toml"))
    assert finding.code == "not-a-file"
    assert "a directory" in finding.message


def test_a_fifo_never_hangs(tmp_path: Path) -> None:
    """A FIFO that nobody writes to is refused at once: a process of its own ends within seconds."""
    path = tmp_path / "tfgpu.toml"
    os.mkfifo(path)
    script = (
        "import os, sys\n"
        "from tfenv.config.document import DocumentError, Trust, read\n"
        "from tfenv.policy.model import Source\n"
        "try: read(Source('project', sys.argv[1]), Trust(os.getuid()))\n"
        "except DocumentError as error: print(error.finding.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "not-a-file\n"


def test_a_socket_and_a_device_are_not_files(tmp_path: Path) -> None:
    """Neither a socket nor a device is a policy."""
    path = tmp_path / "tfgpu.toml"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert read_refused(make_source(path)).code == "not-a-file"
    assert read_refused(Source("project", "/dev/zero")).code == "not-a-file"
    assert read_refused(Source("project", "/dev/tty")).code in ("not-a-file", "unreadable")


def test_links_that_lead_nowhere_are_findings(tmp_path: Path) -> None:
    """A dangling link and a loop of links are told apart."""
    dangling, loop = tmp_path / "dangling.toml", tmp_path / "loop.toml"
    dangling.symlink_to(tmp_path / "nothing")
    loop.symlink_to(loop)
    assert "symbolic link" in read_refused(make_source(dangling)).message
    assert read_refused(make_source(dangling)).code == "not-found"
    assert read_refused(make_source(loop)).code == "unreadable"
    assert "loop" in read_refused(make_source(loop)).message


def test_a_link_to_ones_own_file_is_followed(tmp_path: Path, file: Path) -> None:
    """A link made by oneself to a file of one's own counts."""
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    assert read(make_source(link), Trust(ME)).text == POLICY


@pytest.mark.skipif(ME == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(file: Path) -> None:
    """Mode 000 is a finding that asks for permission."""
    file.chmod(0)
    finding = read_refused(make_source(file))
    assert finding.code == "unreadable"
    assert "permission" in finding.message


@needs_root
def test_roots_private_file_is_unreadable_for_others() -> None:
    """A policy that root wrote with mode 600 is a finding for everybody else, and with 644 it is read."""
    script = (
        "import os, sys\n"
        "from tfenv.config.document import DocumentError, Trust, read\n"
        "from tfenv.policy.model import Source\n"
        # Once as root: the interpreter itself may stand where nobody else may read its modules.
        "read(Source('project', sys.argv[1]), Trust(0))\n"
        f"os.setuid({STRANGER})\n"
        f"try: print(read(Source('project', sys.argv[1]), Trust({STRANGER})).data)\n"
        "except DocumentError as error: print(error.finding.code)\n"
    )
    printed = []
    # Not in tmp_path, whose parents nobody else may enter.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "tfgpu.toml")
        path.write_text("a = 1\n")
        for mode in (0o644, 0o600):
            path.chmod(mode)
            done = subprocess.run(
                [sys.executable, "-c", script, str(path)], cwd=REPOSITORY, capture_output=True, text=True, check=True
            )
            printed.append(done.stdout)
    assert printed == ["{'a': 1}\n", "unreadable\n"]


# ---- size, nesting, encoding, syntax


def test_the_largest_file_is_read_and_one_byte_more_is_not(file: Path) -> None:
    """256 KiB is read. A byte more is refused."""
    file.write_bytes(b"#" * (LARGEST - 1) + b"\n")
    assert read(make_source(file), Trust(ME)).data == {}
    file.write_bytes(b"#" * LARGEST + b"\n")
    assert read_refused(make_source(file)).code == "too-large"
    assert read_refused(Source("run", "<tfgpu run>", text="#" * (LARGEST + 1))).code == "too-large"


def test_a_sparse_giant_is_refused_without_reading_it(file: Path) -> None:
    """A terabyte of holes costs no more than 256 KiB."""
    os.truncate(file, 1 << 40)
    assert read_refused(make_source(file)).code == "too-large"


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 100_000, "a = " + "{a=" * 50_000, "[" + "a." * 50_000 + "a]", "a" + ".a" * 900 + " = 1",
     "a = " + "[" * 100 + "]" * 100],
)  # fmt: skip
def test_deep_nesting_is_a_finding(file: Path, text: str) -> None:
    """Brackets, braces and dots by the thousand never end the interpreter."""
    file.write_text(text)
    assert read_refused(make_source(file)).code in ("too-deep", "syntax")


def test_nesting_that_a_policy_needs_is_accepted(file: Path) -> None:
    """Thirty levels are fine."""
    file.write_text("a = " + "[" * 30 + "]" * 30)
    assert read(make_source(file), Trust(ME)).find_position(("a", *[0] * 29)) == (1, 34)


def test_a_byte_order_mark_and_windows_line_ends_are_tolerated(file: Path) -> None:
    """What Notepad saves as "UTF-8 with BOM" is read, and columns do not count the mark."""
    file.write_bytes(b"\xef\xbb\xbf[gpu]\r\nmemory_growth = true\r\n")
    document = read(make_source(file), Trust(ME))
    assert document.data == {"gpu": {"memory_growth": True}}
    assert document.find_position(("gpu",)) == (1, 2)
    assert document.find_position(("gpu", "memory_growth")) == (2, 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named(file: Path, encoding: str) -> None:
    """UTF-16, with or without a mark, is recognised and the finding says what to save instead."""
    file.write_bytes(POLICY.encode(encoding))
    finding = read_refused(make_source(file))
    assert finding.code == "not-utf8"
    assert encoding[:6].upper() in finding.message
    assert "UTF-8" in finding.message


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_that_is_not_utf_8_has_a_position(file: Path, mark: bytes) -> None:
    """Latin-1 text is refused at the line and column of its first umlaut."""
    file.write_bytes(mark + "# größe\n".encode() + 'a = 1 # "größe"\n'.encode("latin-1"))
    finding = read_refused(make_source(file))
    assert (finding.code, finding.line, finding.column) == ("not-utf8", 2, 12)
    assert "0xf6" in finding.message


def test_a_nul_character_has_a_position(file: Path) -> None:
    """A NUL inside a text is refused where it stands."""
    file.write_bytes(b"# a file\na = 1 # \0\n")
    finding = read_refused(make_source(file))
    assert (finding.code, finding.line, finding.column) == ("syntax", 2, 9)


def test_a_syntax_error_has_a_position_and_says_what_would_be_right(file: Path) -> None:
    """The commonest mistake, a size without quotes, is explained at its place."""
    file.write_text("[gpu]\nmemory_limit = 8GiB\n")
    finding = read_refused(make_source(file))
    assert (finding.code, finding.line, finding.column) == ("syntax", 2, 17)
    file.write_text("[gpu]\nmemory_limit = GiB\n")
    assert '"8GiB"' in read_refused(make_source(file)).message


def test_an_integer_of_thousands_of_digits_is_a_finding(file: Path) -> None:
    """Python's own limit on digits does not become a traceback."""
    file.write_text("a = " + "1" * 5_000)
    assert read_refused(make_source(file)).code == "syntax"


def test_undecodable_text_of_a_command_line_is_a_finding() -> None:
    """Bytes of the environment that are not UTF-8 arrive as surrogates and are refused."""
    assert read_refused(Source("run", "<tfgpu run>", text="a = '\udcff'")).code == "not-utf8"


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8"])
def test_the_locale_does_not_matter(file: Path, locale: str) -> None:
    """A name outside ASCII is read the same in every locale, UTF-8 mode off."""
    file.write_text('[user."jürgen".gpu]\n', encoding="utf-8")
    script = (
        "import os, sys\n"
        "from tfenv.config.document import Trust, read\n"
        "from tfenv.policy.model import Source\n"
        "print(ascii(read(Source('project', sys.argv[1]), Trust(os.getuid())).data))\n"
    )
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stdout == "{'user': {'j\\xfcrgen': {'gpu': {}}}}\n"


@given(st.one_of(st.binary(max_size=80), st.text(alphabet="ab.=[]{}\"'\\\n\r# 1é\0", max_size=80).map(str.encode)))
def test_any_bytes_give_a_document_or_a_finding(raw: bytes) -> None:
    """No content whatever raises anything but DocumentError, and its message is one printable line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tfgpu.toml")
        path.write_bytes(raw)
        try:
            digest, message = read(make_source(path), Trust(ME)).sha256, ""
        except DocumentError as error:
            digest, message = None, str(error)
    assert digest in (None, hashlib.sha256(raw).hexdigest())
    assert message.isprintable()


# ---- swaps


EXCHANGE = """
import os, sys
path, spare = sys.argv[1], sys.argv[1] + ".spare"
while True:
    for letter in "abab":
        with open(spare, "w") as file:
            file.write(f"[gpu]\\nname = '{letter * 50_000}'\\n")
        os.replace(spare, path)
    os.mkfifo(spare)
    os.replace(spare, path)
    os.symlink("/dev/zero", spare)
    os.replace(spare, path)
    os.unlink(path)
    os.mkdir(path)
    os.rmdir(path)
"""


def test_a_file_exchanged_while_it_is_read_is_the_old_the_new_or_a_finding(tmp_path: Path) -> None:
    """While another process puts files, a link, a FIFO and a directory in its place, no reading hangs or mixes."""
    path = tmp_path / "tfgpu.toml"
    contents = [f"[gpu]\nname = '{letter * 50_000}'\n" for letter in "ab"]
    digests = {hashlib.sha256(content.encode()).hexdigest() for content in contents}
    seen: list[str] = []
    deadline = time.monotonic() + 60
    with subprocess.Popen([sys.executable, "-c", EXCHANGE, str(path)]) as other:
        try:
            # The other process may take a while to start, or not to be given the processor.
            while (len(seen) < 1_000 or not {"read", "not-a-file"} <= set(seen)) and time.monotonic() < deadline:
                seen.append(read_outcome(make_source(path), digests))
        finally:
            other.kill()
    assert {"read", "not-a-file"} <= set(seen) <= {"read", "not-found", "not-a-file", "unreadable"}


def read_outcome(source: Source, digests: set[str]) -> str:
    try:
        document = read(source, Trust(ME))
    except DocumentError as error:
        return error.finding.code
    assert document.sha256 in digests
    return "read"


def test_a_kubernetes_swap_gives_one_of_the_two_files(tmp_path: Path) -> None:
    """tfgpu.toml -> ..data/tfgpu.toml, with ..data exchanged by rename, reads as the old or the new file."""
    for version in ("1", "2"):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "tfgpu.toml").write_text(f"version = {version}\n")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "tfgpu.toml").symlink_to("..data/tfgpu.toml")
    seen = set()
    for turn in range(20):
        (tmp_path / "..tmp").symlink_to(f"..{turn % 2 + 1}")
        (tmp_path / "..tmp").rename(tmp_path / "..data")
        seen.add(read(make_source(tmp_path / "tfgpu.toml"), Trust(ME)).text)
    assert seen == {"version = 1\n", "version = 2\n"}


# ---- trust: user and project layer


@needs_root
@pytest.mark.parametrize("layer", ["user", "project"])
def test_a_strangers_file_is_refused(file: Path, layer: LayerName) -> None:
    """A file that belongs to somebody else is left out, and the finding says whose it is and what to do."""
    os.chown(file, STRANGER, -1)
    finding = read_refused(Source(layer, str(file)))
    assert finding.code == "untrusted-owner"
    assert "trusted_owners" in finding.message


@needs_root
def test_a_strangers_file_is_refused_before_its_content_is_looked_at(file: Path) -> None:
    """The finding about a stranger's broken file is about the stranger."""
    file.write_text("[[[")
    os.chown(file, STRANGER, -1)
    assert read_refused(make_source(file)).code == "untrusted-owner"


@needs_root
def test_the_owner_of_the_start_directory_and_trusted_owners_count(file: Path) -> None:
    """A colleague's file counts where the process started in a directory of theirs, or where the machine says so."""
    os.chown(file, STRANGER, -1)
    assert read(make_source(file, start_owner=STRANGER), Trust(ME)).owner == STRANGER
    assert read(make_source(file), Trust(ME, owners=frozenset({STRANGER}))).owner == STRANGER
    assert read_refused(make_source(file, start_owner=1), Trust(ME, owners=frozenset({2}))).code == "untrusted-owner"


@needs_root
def test_roots_file_counts_for_everybody(file: Path) -> None:
    """A file of root is trusted by another user."""
    assert read(make_source(file), Trust(STRANGER)).owner == 0


@needs_root
def test_a_strangers_link_to_ones_own_file_is_refused(tmp_path: Path, file: Path) -> None:
    """Somebody else may not choose which of my files is my policy."""
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    os.chown(link, STRANGER, -1, follow_symlinks=False)
    assert read_refused(make_source(link)).code == "untrusted-owner"


@pytest.mark.parametrize("layer", ["user", "project"])
def test_a_file_writable_by_everybody_is_refused(file: Path, layer: LayerName) -> None:
    """One's own file with mode 666 could be anybody's."""
    file.chmod(0o666)
    assert read_refused(Source(layer, str(file))).code == "insecure-permissions"
    file.chmod(0o664)
    assert read(Source(layer, str(file)), Trust(ME)).text == POLICY


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_directory_writable_by_everybody_is_refused(tmp_path: Path, file: Path, mode: int) -> None:
    """A file in a directory like /tmp may have been planted, sticky bit or not."""
    tmp_path.chmod(mode)
    finding = read_refused(make_source(file))
    assert finding.code == "insecure-permissions"
    assert str(tmp_path) in finding.message


def test_a_link_does_not_hide_a_public_directory(tmp_path: Path) -> None:
    """Both the directory of the link and that of the file it leads to are looked at."""
    private, public = tmp_path / "private", tmp_path / "public"
    for directory in (private, public):
        directory.mkdir()
        (directory / "real.toml").write_text(POLICY)
    public.chmod(0o1777)
    (private / "tfgpu.toml").symlink_to(public / "real.toml")
    (public / "tfgpu.toml").symlink_to(private / "real.toml")
    assert read_refused(make_source(private / "tfgpu.toml")).code == "insecure-permissions"
    assert read_refused(make_source(public / "tfgpu.toml")).code == "insecure-permissions"


# ---- trust: machine layer


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "tfgpu" / "tfgpu.toml"
    path.parent.mkdir(parents=True)
    path.write_text(POLICY)
    path.chmod(0o644)
    for directory in (path.parent, path.parent.parent, tmp_path):
        directory.chmod(0o755)
    return path


def trust_me_below(tmp_path: Path) -> Trust:
    """Return a trust as if whoever runs the tests were root, and tmp_path the root of the file system."""
    return Trust(ME, administrator=ME, checked_from=str(tmp_path))


def test_a_machine_file_of_the_administrator_alone_counts(tmp_path: Path, machine: Path) -> None:
    """Owned by the administrator, writable by nobody else, from the top down: it is read."""
    assert read(Source("machine", str(machine)), trust_me_below(tmp_path)).text == POLICY


@pytest.mark.parametrize("place", ["etc", "etc/tfgpu", "etc/tfgpu/tfgpu.toml"])
@pytest.mark.parametrize("bits", [0o020, 0o002, 0o1002])
def test_a_machine_file_that_others_may_write_is_refused(tmp_path: Path, machine: Path, place: str, bits: int) -> None:
    """Group or others may write neither the file nor any directory above it, sticky or not."""
    target = tmp_path / place
    target.chmod(target.stat().st_mode | bits)
    assert read_refused(Source("machine", str(machine)), trust_me_below(tmp_path)).code == "insecure-permissions"


@needs_root
@pytest.mark.parametrize("place", ["etc", "etc/tfgpu", "etc/tfgpu/tfgpu.toml"])
def test_a_machine_file_of_somebody_else_is_refused(tmp_path: Path, machine: Path, place: str) -> None:
    """Neither the file nor any directory above it may belong to anybody but root."""
    os.chown(tmp_path / place, STRANGER, -1)
    trust = Trust(STRANGER, owners=frozenset({STRANGER}), checked_from=str(tmp_path))
    assert read_refused(Source("machine", str(machine), start_owner=STRANGER), trust).code == "insecure-permissions"


def test_a_machine_file_is_refused_if_a_link_passes_through_a_public_directory(tmp_path: Path, machine: Path) -> None:
    """Every directory that a chain of links passes counts, not only the first and the last."""
    public = tmp_path / "public"
    public.mkdir()
    (machine.parent / "real.toml").write_text(POLICY)
    machine.unlink()
    machine.symlink_to("../../public/middle.toml")
    (public / "middle.toml").symlink_to(machine.parent / "real.toml")
    source = Source("machine", str(machine))
    public.chmod(0o755)
    assert read(source, trust_me_below(tmp_path)).text == POLICY
    public.chmod(0o1777)
    finding = read_refused(source, trust_me_below(tmp_path))
    assert finding.code == "insecure-permissions"
    assert str(public) in finding.message


@needs_root
def test_the_real_check_goes_up_to_the_root() -> None:
    """Without any anchor, a file below /tmp is refused for /tmp, and one below root's home counts."""
    home = os.path.expanduser("~root")
    with tempfile.TemporaryDirectory(dir="/tmp") as public, tempfile.TemporaryDirectory(dir=home) as private:
        for folder in (public, private):
            Path(folder, "tfgpu.toml").write_text(POLICY)
        assert "/tmp is writable" in read_refused(Source("machine", f"{public}/tfgpu.toml"), Trust(STRANGER)).message
        assert read(Source("machine", f"{private}/tfgpu.toml"), Trust(STRANGER)).owner == 0


# ---- what reaches a terminal


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a\x1b[31m\nb\u2028\u202ec"
    folder.mkdir()
    return folder


def test_a_hostile_path_is_shown_escaped(hostile_folder: Path) -> None:
    """Line breaks, escape sequences and direction marks in a path never reach the terminal raw."""
    path = hostile_folder / "tfgpu.toml"
    path.write_text('"\x07" = 1')
    finding = read_refused(make_source(path))
    text = str(finding)
    assert text.isprintable()
    assert "a\\x1b[31m\\nb\\u2028\\u202ec" in text
    assert finding.where.isprintable()


def test_plain_text_is_shown_as_it_is() -> None:
    """What can be printed is left alone, in any script."""
    assert escape_for_terminal("/srv/größe 模型/é") == "/srv/größe 模型/é"
    assert escape_for_terminal("\udcff\x9b") == "\\udcff\\x9b"


def test_a_document_is_a_value(file: Path) -> None:
    """Two readings of one file are equal, also after a position was asked for."""
    first, second = (read(make_source(file), Trust(ME)) for _ in range(2))
    first.find_position(("gpu",))
    assert isinstance(first, Document)
    assert first == second


READ_ONLY = """
import sys
from tfenv.config.document import DocumentError, Trust, read
from tfenv.policy.model import Source
try:
    print(read(Source("project", sys.argv[1]), Trust(0)).data)
except DocumentError as error:
    print(error.finding.code)
"""


@needs_root
def test_a_public_directory_on_a_read_only_mount_is_trusted(file: Path) -> None:
    """Kubernetes mounts a ConfigMap read-only with mode 0777: nobody can plant a file there."""
    file.parent.chmod(0o777)
    mount = f"mount --bind {file.parent} {file.parent} && mount -o remount,ro,bind {file.parent} && "
    ask = f'exec "{sys.executable}" -c "$ASK" {file}'
    answers = []
    for command in (ask, mount + ask):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", command],
            env={**os.environ, "ASK": READ_ONLY, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
        answers.append(done.stdout.strip())
    assert answers == ["insecure-permissions", "{'gpu': {'memory_limit': '8GiB'}}"]


@pytest.mark.parametrize(
    ("text", "column", "hint"),
    [
        ("memory_growth\u00a0= true", 14, 'U+00A0 "no-break space": write a normal space'),
        ("\u200bmemory_growth = true", 1, 'U+200B "zero width space": remove it'),
        ("memory_limit = \u201c8GiB\u201d", 16, 'U+201C "left double quotation mark": write "'),
    ],
)
def test_characters_that_look_like_others_are_named(text: str, column: int, hint: str, tmp_path: Path) -> None:
    """What word processors and chats put into a file cannot be seen: the message says what it is."""
    path = tmp_path / "tfgpu.toml"
    path.write_text(f"[gpu]\n{text}\n", encoding="utf-8")
    with pytest.raises(DocumentError) as raised:
        read(Source("project", str(path)), Trust(os.geteuid()))
    assert (raised.value.finding.line, raised.value.finding.column) == (2, column)
    assert hint in raised.value.finding.message
