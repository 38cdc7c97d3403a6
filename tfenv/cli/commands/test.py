"""`tfgpu test`: run the cases of *.test.toml against a policy, without a GPU."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from tfenv.cli.output import (
    FINDINGS,
    OK,
    USAGE,
    add_description,
    format_toml,
    paint,
    print_findings,
    print_json,
    print_message,
    shorten_path,
)
from tfenv.config.discover import find_search_end
from tfenv.config.presence import FILE_NAME, MACHINE_ROOT, PYPROJECT
from tfenv.errors import escape_for_terminal
from tfenv.files import replace_file
from tfenv.lint.check import TEST_SUFFIX
from tfenv.pipeline import current_start
from tfenv.policy_tests.model import Case, CaseResult, DecidingKey, RunResult, Suite
from tfenv.policy_tests.read import list_test_files, list_tests_beside, read_suite
from tfenv.policy_tests.run import describe_result, run_suites
from tfenv.values import as_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        f"A file *{TEST_SUFFIX} says what a policy is to give to whom. It is compared with what the policy says, for "
        "processes that you describe. Nothing is started and no GPU is needed. Exit codes: 0 all cases passed, 1 a "
        "case failed or a file has a mistake, 2 there is no such file or case.",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="FILE",
        help=f"Run the cases of this file, or of every *{TEST_SUFFIX} in this directory and below it (default: those "
             f"in this directory, in the project's, and for root in {MACHINE_ROOT}).",
    )  # fmt: skip
    parser.add_argument(
        "-k", dest="pattern", metavar="PATTERN", help="Run only cases whose names contain this text. * is any text."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="List the cases that passed, too.")
    parser.add_argument(
        "--format", choices=("text", "json", "junit"), default="text",
        help="Print text, JSON for programs, or the XML of JUnit for CI servers.",
    )  # fmt: skip
    parser.add_argument("--junit", metavar="FILE", help="Write the XML of JUnit into this file, too.")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return run_tests(
        arguments.paths,
        arguments.format,
        pattern=arguments.pattern,
        verbose=arguments.verbose,
        junit=arguments.junit,
    )


def run_tests(
    paths: Sequence[str],
    output_format: str = "text",
    *,
    pattern: str | None = None,
    verbose: bool = False,
    junit: str | None = None,
) -> int:
    """Run cases and print what came of them.

    Args:
        paths: Files, or directories. (): those that are tried by default.
        output_format: "text", "json" or "junit".
        pattern: Part of the name of the cases to run, or a glob. None: all.
        verbose: Whether to list the cases that passed.
        junit: The file to write JUnit's XML into. None: none.

    Returns:
        The exit code.
    """
    missing = [path for path in paths if not os.path.lexists(path)]
    if missing:
        print_message("test", f"there is no {missing[0]}; correct the path")
        return USAGE
    files = list(dict.fromkeys(_list_files(paths) if paths else _list_default_files()))
    if not files:
        _complain_of_no_file(paths)
        return USAGE
    suites = [read_suite(file) for file in files]
    result = run_suites(suites, lambda case: pattern is None or _matches(case, pattern))
    if pattern is not None and not result.results and any(suite.cases for suite in suites):
        print_message("test", f'no case has "{pattern}" in its name; -v lists the names')
        return USAGE
    _print_result(suites, result, output_format, verbose=verbose)
    if junit is not None:
        from tfenv.policy_tests.junit import format_junit

        replace_file(junit, format_junit(suites, result), overwrite=True)
    failed = result.findings or any(case.differences for case in result.results)
    return FINDINGS if failed else OK


def _matches(case: Case, pattern: str) -> bool:
    return fnmatchcase(case.name.lower(), f"*{pattern.lower()}*")


# ---- which files


def _list_files(paths: Sequence[str]) -> Iterator[str]:
    for path in map(os.path.abspath, paths):
        yield from list_test_files(path) if os.path.isdir(path) else [path]


def _list_default_files() -> Iterator[str]:
    for folder in _list_default_folders():
        yield from list_tests_beside(folder)


def _list_default_folders() -> list[str]:
    """List this directory, that of the nearest policy above it, and for root the machine's."""
    start = current_start()
    if start.cwd is None:
        return []
    folders, end = [start.cwd], find_search_end(start)
    while end is not None and not _has_policy(folders[-1]) and folders[-1] not in (end[0], "/"):
        folders.append(os.path.dirname(folders[-1]))
    folders = list(dict.fromkeys((folders[0], folders[-1])))
    return [*folders, MACHINE_ROOT] if os.geteuid() == 0 else folders


def _has_policy(folder: str) -> bool:
    return any(os.path.lexists(os.path.join(folder, name)) for name in (FILE_NAME, PYPROJECT))


def _complain_of_no_file(paths: Sequence[str]) -> None:
    folders = list(map(os.path.abspath, paths)) or _list_default_folders()
    places = ", ".join(shorten_path(folder) for folder in folders)
    print_message("test", f"there is no *{TEST_SUFFIX} in {places}; name a file, or write one as docs/testing.md shows")


# ---- output


def _print_result(suites: Sequence[Suite], result: RunResult, output_format: str, *, verbose: bool) -> None:
    if output_format == "json":
        cases = [describe_result(case) for case in result.results]
        print_json({"files": [suite.path for suite in suites], "cases": cases, "findings": as_dict(result.findings)})
    elif output_format == "junit":
        from tfenv.policy_tests.junit import format_junit

        print(format_junit(suites, result), end="")
    else:
        _print_text(result, verbose=verbose)


def _print_text(result: RunResult, *, verbose: bool) -> None:
    print_findings(result.findings)
    for case in result.results:
        if case.differences:
            _print_failure(case)
        elif verbose:
            print(f"{paint('passed', 'ok')}  {escape_for_terminal(case.case.name)}")
    print(_count(result))


def _count(result: RunResult) -> str:
    failed = sum(1 for case in result.results if case.differences)
    passed = len(result.results) - failed
    parts = [paint(f"{failed} failed", "problem")] if failed else []
    parts += [paint(f"{passed} passed", "ok") if passed else "0 passed"]
    if result.findings:
        parts.append(f"{len(result.findings)} mistake{'' if len(result.findings) == 1 else 's'}")
    return ", ".join(parts)


def _print_failure(result: CaseResult) -> None:
    place = f"{shorten_path(result.suite.path)}:{result.line}"
    print(f"{paint('failed', 'problem')}  {paint(escape_for_terminal(result.case.name), 'strong')}  {place}")
    rows = [tuple(map(escape_for_terminal, (each.key, each.expected, each.got))) for each in result.differences]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for difference, (key, expected, got) in zip(result.differences, rows, strict=True):
        print(f"  {key:<{widths[0]}}  expected {expected:<{widths[1]}}  got {got}")
        for decided_by in difference.decided_by:
            print(f"  {'':<{widths[0]}}  {_format_deciding_key(decided_by)}")
        print_findings(difference.findings, f"  {'':<{widths[0]}}  ")


def _format_deciding_key(decided: DecidingKey) -> str:
    place = shorten_path(decided.path) + ("" if decided.line is None else f":{decided.line}")
    value = "" if decided.value is None else f" = {format_toml(decided.value)}"
    return f"{place}  {escape_for_terminal(decided.key + value)}"
