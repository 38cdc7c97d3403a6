"""The nouns of policy tests: a file of cases, a case, what it expects, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from tfenv.config.document import Document
from tfenv.errors import Finding
from tfenv.policy.model import Inventory, KeyPath, LayerName, MemoryLimit, Share, Subject
from tfenv.values import field, frozen

#: Files of others that a case may bring, by the key that names them.
CASE_FILES: Mapping[str, LayerName] = {"site_file": "site", "user_file": "user", "project_file": "project"}


@frozen
class Expectation:
    """What a process is expected to get. None stands for what is not compared.

    Attributes:
        devices: How many GPUs, or which ones: numbers as nvidia-smi counts, "0:1", or UUIDs.
        memory_limit: One value for every GPU, or one for each.
        memory_total: The same of all processes of the user together.
        memory_growth: Whether a policy turns it on.
        allocator: "none" where the program decides.
        findings: The codes of all findings.
        refused: Whether the import of a framework raises PolicyError.
        observed: What the process would get if the tables under `[observe]` were in force.
        written: The values as they stand in the file, by key.
    """

    devices: int | tuple[int | str, ...] | None = None
    memory_limit: tuple[MemoryLimit, ...] | None = None
    memory_total: tuple[MemoryLimit, ...] | None = None
    memory_growth: bool | None = None
    allocator: str | None = None
    findings: frozenset[str] | None = None
    refused: bool | None = None
    observed: Expectation | None = None
    written: Mapping[str, object] = field(default_factory=dict)


@frozen
class CaseFile:
    """A file of somebody else's that speaks in a case.

    Attributes:
        layer: Whose it is.
        path: Its absolute path. For tables in the case itself "<user_file>" and so on.
        data: Those tables. None: it is a file.
        key: Where the tables stand in the file of tests.
    """

    layer: LayerName
    path: str
    data: Mapping[str, object] | None = None
    key: KeyPath = ()


@frozen
class Case:
    """One process, and what the policy is expected to give it.

    Attributes:
        name: What the case shows.
        number: Its place in the file, from 0.
        subject: Whose process it is, and in which project.
        today: The day, as "2027-01-31". None: the machine's.
        inventory: The GPUs of the machine.
        environment: What the launcher sets.
        share: The part of each GPU that was given, where no variable tells it.
        request: What the program writes into CUDA_VISIBLE_DEVICES. None: nothing.
        files: Of site, user and project.
        expect: What is compared.
    """

    name: str
    number: int
    subject: Subject
    inventory: Inventory
    expect: Expectation
    today: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    share: Share | None = None
    request: str | None = None
    files: tuple[CaseFile, ...] = ()


@frozen
class PolicyUnderTest:
    """The policy that a file of tests is about.

    Attributes:
        layer: Whose it is.
        path: The directory of a machine layer, or a file.
    """

    layer: LayerName
    path: str


@frozen
class Suite:
    """A file of test cases.

    Attributes:
        path: Its absolute path.
        document: What was read. None: it could not be.
        policy: What is tested. None: it cannot be told.
        cases: The cases in which nothing is wrong.
        findings: What is wrong with the others.
    """

    path: str
    document: Document | None = None
    policy: PolicyUnderTest | None = None
    cases: tuple[Case, ...] = ()
    findings: tuple[Finding, ...] = ()

    def find_position(self, key: KeyPath) -> tuple[int, int]:
        """Return line and column of a key. The first ones where they are not known."""
        return (None if self.document is None else self.document.find_position(key)) or (1, 1)


@frozen
class DecidingKey:
    """A key that decided what a process gets.

    Attributes:
        path: The file.
        key: Dotted, inside the file.
        value: As its author wrote it. None: it is not known.
        line: 1-based. None: unknown.
        column: 1-based. None: unknown.
    """

    path: str
    key: str
    value: object = None
    line: int | None = None
    column: int | None = None


@frozen
class Difference:
    """A value that is not what a case expects.

    Attributes:
        key: "memory_limit", "observed.devices".
        expected: In words.
        got: In words.
        decided_by: The keys that decided it.
        findings: What was found on the way, where that explains it.
    """

    key: str
    expected: str
    got: str
    decided_by: tuple[DecidingKey, ...] = ()
    findings: tuple[Finding, ...] = ()


@frozen
class CaseResult:
    """What came of a case.

    Attributes:
        suite: Where it stands.
        case: The case.
        differences: What is not as expected. (): it passed.
    """

    suite: Suite
    case: Case
    differences: tuple[Difference, ...] = ()

    @property
    def status(self) -> Literal["passed", "failed"]:
        """Whether all is as expected."""
        return "failed" if self.differences else "passed"

    @property
    def line(self) -> int:
        """The line of the case, 1-based."""
        return self.suite.find_position(("case", self.case.number))[0]


@frozen
class RunResult:
    """What came of some files of tests.

    Attributes:
        results: One for each case that ran, in the order of the files.
        findings: What is wrong with the files, and with the policies that they test.
    """

    results: tuple[CaseResult, ...] = ()
    findings: tuple[Finding, ...] = ()
