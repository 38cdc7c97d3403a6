"""The XML of JUnit, as pytest writes it and CI servers read it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from tfenv.errors import Finding, escape_for_terminal
from tfenv.policy_tests.model import CaseResult, Difference, RunResult, Suite


def format_junit(suites: Sequence[Suite], result: RunResult) -> str:
    """Return the document: one suite for each file, one case for each case, and one for each mistake in a file."""
    root = ET.Element("testsuites", name="tfgpu test")
    for suite in suites:
        cases = [case for case in result.results if case.suite is suite]
        _add_suite(root, suite, cases, [finding for finding in result.findings if finding.path == suite.path])
    known = {suite.path for suite in suites}
    others = [finding for finding in result.findings if finding.path not in known]
    for path in dict.fromkeys(finding.path or "" for finding in others):
        _add_suite(root, Suite(path), [], [finding for finding in others if (finding.path or "") == path])
    ET.indent(root)
    # In ASCII it is right in whatever encoding it is printed.
    text: bytes = ET.tostring(root, encoding="us-ascii", xml_declaration=True)
    return text.decode() + "\n"


def _add_suite(root: ET.Element, suite: Suite, cases: Sequence[CaseResult], findings: Sequence[Finding]) -> None:
    name = _clean(os.path.relpath(suite.path))
    numbers = {
        "tests": len(cases) + len(findings),
        "failures": sum(1 for case in cases if case.differences),
        "errors": len(findings),
        "skipped": 0,
    }
    node = ET.SubElement(root, "testsuite", {"name": name, **{key: str(value) for key, value in numbers.items()}})
    node.set("time", "0")
    for finding in findings:
        message = _clean(finding.message)
        case = ET.SubElement(node, "testcase", classname=name, name=_clean(finding.key or finding.code), time="0")
        ET.SubElement(case, "error", message=message, type=finding.code).text = _clean(str(finding))
    for result in cases:
        _add_case(node, name, result)


def _add_case(node: ET.Element, suite: str, result: CaseResult) -> None:
    case = ET.SubElement(node, "testcase", classname=suite, name=_clean(result.case.name), time="0")
    if result.differences:
        first = result.differences[0]
        message = _clean(f"{first.key}: expected {first.expected}, got {first.got}")
        lines = [f"{suite}:{result.line}", *(line for each in result.differences for line in _describe(each))]
        ET.SubElement(case, "failure", message=message, type="failed").text = "\n".join(map(_clean, lines))


def _describe(difference: Difference) -> list[str]:
    lines = [f"{difference.key}: expected {difference.expected}, got {difference.got}"]
    for decided in difference.decided_by:
        place = ":".join(str(part) for part in (decided.path, decided.line) if part is not None)
        lines.append(f"  by {place}: {decided.key}")
    return lines + [f"  {finding}" for finding in difference.findings]


def _clean(text: str) -> str:
    """Return a text that XML can hold: it has no control characters, not even escaped ones."""
    return escape_for_terminal(text)
