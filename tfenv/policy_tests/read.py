"""Reads a file of tests: TOML to cases. Whatever is wrong in it is a finding with file, line and column."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from tfenv.config.discover import PYPROJECT_TABLE
from tfenv.config.document import Document, DocumentError, Trust, peek_text, read
from tfenv.config.presence import FILE_NAME, PYPROJECT
from tfenv.config.values import quote_value
from tfenv.errors import Finding
from tfenv.lint.check import TEST_SUFFIX, is_machine_root
from tfenv.policy.model import Inventory, KeyPath, LayerName, MemoryLimit, Share, Source, Subject, format_key
from tfenv.policy.units import parse_limit
from tfenv.policy_tests.launch import build_environment
from tfenv.policy_tests.model import CASE_FILES, Case, CaseFile, Expectation, PolicyUnderTest, Suite
from tfenv.policy_tests.schema_errors import find_errors
from tfenv.simulate.environment import parse_gpus
from tfenv.simulate.inventory import list_devices
from tfenv.values import replace

#: `gpus` of a machine without a driver.
_NO_GPUS = "none"
_NOBODY = "somebody"
#: Findings that are listed for one file. The others are counted.
_MOST_FINDINGS = 100
#: Directories in which nobody has tests of a policy.
_SKIPPED_FOLDERS = frozenset({"node_modules", "__pycache__", "site-packages"})


def list_test_files(folder: str) -> list[str]:
    """List the files of tests in a directory and below it. Hidden directories and those of packages are left out."""
    found: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS)
        found += [os.path.join(place, name) for name in sorted(names) if name.endswith(TEST_SUFFIX)]
    return found


def list_tests_beside(folder: str) -> list[str]:
    """List the files of tests in a directory, but not below it. [] if it cannot be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names if name.endswith(TEST_SUFFIX)]


def read_suite(path: str) -> Suite:
    """Read a file of tests. Never raises for what is written in it.

    Args:
        path: Its absolute path.
    """
    try:
        source = Source("project", path, text=peek_text(path))
        document = read(source, Trust(os.geteuid()))
    except DocumentError as error:
        return Suite(path, findings=(error.finding,))
    return _SuiteReader(document).read()


class _CaseError(Exception):
    """Something in a case is wrong.

    Attributes:
        key: Where, inside the case.
    """

    def __init__(self, key: KeyPath, message: str) -> None:
        self.key = key
        super().__init__(message)


class _SuiteReader:
    """Turns one document into cases."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._folder = os.path.dirname(document.source.path)
        self._findings: list[Finding] = []
        self._inventories: dict[tuple[str, tuple[str, ...] | None], Inventory] = {}

    def read(self) -> Suite:
        data = _spell_dates(self._document.data)
        wrong_cases: set[int] = set()
        beyond_cases = False
        for path, message in find_errors(data):
            self._report(path, message)
            if len(path) > 1 and path[0] == "case":
                wrong_cases.add(cast("int", path[1]))
            else:
                beyond_cases = True
        if beyond_cases:
            return self._finish(None, ())
        policy = self._find_policy(data)
        cases = tuple(self._read_cases(data, wrong_cases, policy))
        return self._finish(policy, cases)

    def _finish(self, policy: PolicyUnderTest | None, cases: tuple[Case, ...]) -> Suite:
        findings = sorted(self._findings, key=lambda finding: (finding.line or 0, finding.column or 0))
        if more := findings[_MOST_FINDINGS:]:
            message = f"… and {len(more)} more; correct the listed ones first"
            findings = [*findings[:_MOST_FINDINGS], Finding("more-findings", message, path=self._document.source.path)]
        return Suite(self._document.source.path, self._document, policy, cases if policy else (), tuple(findings))

    def _report(self, path: KeyPath, message: str) -> None:
        place = self._document.source.path
        if len(self._findings) > _MOST_FINDINGS:  # finding a place takes time
            self._findings.append(Finding("invalid-test", message, path=place))
            return
        line, column = self._document.find_position(path) or (None, None)
        self._findings.append(Finding("invalid-test", message, "error", place, line, column, format_key(path) or None))

    # -- the policy

    def _find_policy(self, data: Mapping[str, Any]) -> PolicyUnderTest | None:
        written = str(data.get("policy", "."))
        path = os.path.normpath(os.path.join(self._folder, written.replace("\0", "")))
        layer = cast("LayerName | None", data.get("layer"))
        if os.path.isfile(path):
            folder = os.path.dirname(path)
            if os.path.basename(folder) in ("groups", "users") and is_machine_root(os.path.dirname(folder)):
                return PolicyUnderTest("machine", os.path.dirname(folder))
            if layer is None and os.path.basename(path) == FILE_NAME and is_machine_root(folder):
                return PolicyUnderTest("machine", folder)
            return PolicyUnderTest(layer or "project", folder if layer == "machine" else path)
        if os.path.isdir(path):
            if layer == "machine" or (layer is None and is_machine_root(path)):
                return PolicyUnderTest("machine", path)
            for name in (FILE_NAME, PYPROJECT):
                if os.path.lexists(os.path.join(path, name)):
                    return PolicyUnderTest(layer or "project", os.path.join(path, name))
            self._report(("policy",), f"there is no {FILE_NAME} in {quote_value(written)}; write where the policy is")
        else:
            self._report(("policy",), f"there is no {quote_value(written)}; write where the policy is")
        return None

    # -- cases

    def _read_cases(self, data: Mapping[str, Any], wrong: set[int], policy: PolicyUnderTest | None) -> Iterator[Case]:
        defaults, names = data.get("defaults", {}), set[str]()
        for number, table in enumerate(data["case"]):
            if number in wrong:
                continue
            name = table["name"]
            if name in names:
                self._report(("case", number, "name"), f"another case is called {quote_value(name)}; change one name")
                continue
            names.add(name)
            try:
                yield self._read_case(number, table, defaults, policy)
            except _CaseError as error:
                origin = ("case", number) if not error.key or error.key[0] in table else ("defaults",)
                self._report((*origin, *error.key), str(error))

    def _read_case(
        self, number: int, table: Mapping[str, Any], defaults: Mapping[str, Any], policy: PolicyUnderTest | None
    ) -> Case:
        values = {**defaults, **table}
        inventory = self._read_gpus(values)
        files = tuple(self._read_files(number, table, defaults, policy))
        grant, launcher, rank = values.get("grant"), values.get("launcher"), values.get("rank")
        environment = build_environment(launcher, _whole(grant), _whole(rank), inventory)
        return Case(
            name=table["name"],
            number=number,
            subject=_read_subject(values, files, policy),
            inventory=inventory,
            expect=_read_expectation(table["expect"], ("expect",)),
            today=_read_date(values.get("today")),
            environment={**environment, **values.get("environment", {})},
            share=_read_share(values),
            request=values.get("cuda_visible_devices"),
            files=files,
        )

    def _read_gpus(self, values: Mapping[str, Any]) -> Inventory:
        if "gpus" not in values:
            raise _CaseError((), 'names no GPUs; write gpus = "4x80GiB", here or in [defaults]')
        text, uuids = str(values["gpus"]), values.get("uuids")
        key = (text, None if uuids is None else tuple(uuids))
        if key not in self._inventories:
            self._inventories[key] = _make_inventory(*key)
        return self._inventories[key]

    def _read_files(
        self, number: int, table: Mapping[str, Any], defaults: Mapping[str, Any], policy: PolicyUnderTest | None
    ) -> Iterator[CaseFile]:
        for name, layer in CASE_FILES.items():
            holder: KeyPath = ("case", number) if name in table else ("defaults",)
            value = table.get(name, defaults.get(name))
            if value is None:
                continue
            if policy is not None and policy.layer == layer:
                raise _CaseError((name,), f"the policy that is tested is the {layer}'s file itself; leave {name} out")
            if isinstance(value, str):
                path = os.path.normpath(os.path.join(self._folder, value))
                if "\0" in path or not os.path.lexists(path):
                    raise _CaseError((name,), f"there is no {quote_value(value)}; correct the path")
                yield CaseFile(layer, path)
            else:
                yield CaseFile(layer, f"<{name}>", value, (*holder, name))


def _spell_dates(data: Mapping[str, object]) -> dict[str, Any]:
    """Return the document with TOML's dates as text, where the schema has a date. JSON has no dates."""
    spelled = dict(data)
    if isinstance(data.get("defaults"), Mapping):
        spelled["defaults"] = _spell_date(data["defaults"])
    cases = data.get("case")
    if isinstance(cases, list):
        spelled["case"] = [_spell_date(case) for case in cases]
    return spelled


def _spell_date(table: object) -> object:
    if isinstance(table, Mapping) and type(table.get("today")).__name__ == "date":
        return {**table, "today": str(table["today"])}
    return table


def _whole(value: Any) -> Any:
    """Return whole numbers as integers: JSON Schema takes 1.0 for one."""
    if isinstance(value, float):
        return int(value)
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _make_inventory(text: str, uuids: tuple[str, ...] | None) -> Inventory:
    if text == _NO_GPUS:
        inventory = Inventory(problem="this machine has no NVIDIA driver", no_driver=True)
    else:
        try:
            inventory = list_devices(parse_gpus(text))
        except ValueError as error:
            raise _CaseError(("gpus",), str(error)) from None
    if uuids is None:
        return inventory
    devices = inventory.devices or ()
    if len(uuids) != len(devices):
        raise _CaseError(("uuids",), f"{len(uuids)} UUIDs for {len(devices)} GPUs; write one for each, in their order")
    if len({uuid.lower() for uuid in uuids}) != len(uuids):
        raise _CaseError(("uuids",), "two GPUs have the same UUID; write another one")
    renamed = (replace(device, uuid=uuid) for device, uuid in zip(devices, uuids, strict=True))
    return replace(inventory, devices=tuple(renamed))


def _read_subject(values: Mapping[str, Any], files: Sequence[CaseFile], policy: PolicyUnderTest | None) -> Subject:
    user, uid = values.get("user", _NOBODY), _whole(values.get("uid"))
    number = user.removeprefix("uid:")
    if uid is None:
        uid = int(number) if number != user and number.isascii() and number.isdigit() and len(number) < 11 else -1  # noqa: PLR2004 - digits of a uid
    project = values.get("project")
    if project is None:
        paths = [file.path for file in files if file.layer == "project" and file.data is None]
        paths += [policy.path] if policy is not None and policy.layer == "project" else []
        project = os.path.dirname(paths[0]) if paths else None
    return Subject(user, uid, tuple(dict.fromkeys(values.get("groups", ()))), project)


def _read_date(text: str | None) -> str | None:
    from datetime import date

    try:
        return None if text is None else date.fromisoformat(text).isoformat()
    except ValueError:
        raise _CaseError(("today",), f"{quote_value(text)} is not a day; write today = 2027-02-01") from None


def _read_share(values: Mapping[str, Any]) -> Share | None:
    share = values.get("share")
    if share is None:
        return None
    if not 0 < share <= 1:  # nan is neither
        raise _CaseError(("share",), f"{share} is not a part of a GPU; write share = 0.25")
    return Share(values.get("launcher", "the launcher"), f"share = {share:g}", float(share))


# ---- what is expected


def _read_expectation(table: Mapping[str, Any], path: KeyPath) -> Expectation:
    devices = _whole(table.get("devices"))
    findings, observed = table.get("findings"), table.get("observed")
    return Expectation(
        devices=tuple(devices) if isinstance(devices, list) else devices,
        memory_limit=_read_limits(table, path, "memory_limit"),
        memory_total=_read_limits(table, path, "memory_total"),
        memory_growth=table.get("memory_growth"),
        allocator=table.get("allocator"),
        findings=None if findings is None else frozenset(findings),
        refused=table.get("refused"),
        observed=None if observed is None else _read_expectation(observed, (*path, "observed")),
        written=table,
    )


def _read_limits(table: Mapping[str, Any], path: KeyPath, key: str) -> tuple[MemoryLimit, ...] | None:
    written = table.get(key)
    if written is None:
        return None
    try:
        return tuple(parse_limit(text) for text in ([written] if isinstance(written, str) else written))
    except ValueError as error:
        raise _CaseError((*path, key), str(error)) from None


def get_policy_table(path: str) -> tuple[str, ...]:
    """Return where the policy starts in a file."""
    return PYPROJECT_TABLE if os.path.basename(path) == PYPROJECT else ()
