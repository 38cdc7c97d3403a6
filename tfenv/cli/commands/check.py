"""`tfgpu check`: find the mistakes in policy files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from tfenv.cli.output import (
    USAGE,
    add_description,
    add_format_option,
    get_exit_code,
    paint,
    print_findings,
    print_json,
    shorten_path,
)
from tfenv.errors import Finding
from tfenv.lint.check import TEST_SUFFIX, CheckResult, check_here, check_path
from tfenv.values import as_dict

#: Files that are told by name when all is well.
_MOST_NAMES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "Run it after you change a file. It also finds values that are allowed but probably wrong. "
        "Exit codes: 0 no findings, or only notes, 1 errors or warnings, 2 no such file.",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH",
        help="Check this tfgpu.toml, pyproject.toml or directory (default: every file that applies here).",
    )  # fmt: skip
    parser.add_argument(
        "--table-optional", action="store_true",
        help="Accept a pyproject.toml without [tool.tfgpu]. Use it with pre-commit, which names every changed file.",
    )  # fmt: skip
    add_format_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return check_files(arguments.paths, arguments.format, table_optional=arguments.table_optional)


def check_files(paths: Sequence[str], output_format: str, *, table_optional: bool = False) -> int:
    """Check files and print what is wrong with them.

    Args:
        paths: The files, or directories of policies. (): the files that count for a program started here.
        output_format: "text" or "json".
        table_optional: Whether a pyproject.toml without a policy is no mistake.

    Returns:
        The exit code: 1 if there is an error or a warning, 2 if one of the paths does not exist.
    """
    results = [_check(path, table_optional=table_optional) for path in paths]
    result = sum(results, CheckResult()) if paths else check_here()
    if output_format == "json":
        print_json(as_dict({"files": result.files, "findings": result.findings}))
    else:
        _print_text(result)
    missing = any(not os.path.lexists(path) for path in paths)
    return USAGE if missing else get_exit_code(result.findings)


def _check(path: str, *, table_optional: bool) -> CheckResult:
    """Check a policy, or a directory of policies with the tests beside them, or a file of tests."""
    # Late: it loads what simulates GPUs.
    from tfenv.policy_tests.read import list_tests_beside, read_suite

    if path.endswith(TEST_SUFFIX):
        tests, result = [os.path.abspath(path)], CheckResult()
    else:
        tests = list_tests_beside(os.path.abspath(path)) if os.path.isdir(path) else []
        result = check_path(path, table_optional=table_optional)
    suites = map(read_suite, tests)
    return sum((CheckResult((suite.path,), suite.findings) for suite in suites), result)


def _print_text(result: CheckResult) -> None:
    print_findings(result.findings)
    if not result.findings and not result.files:
        print("No policy file applies here. Run `tfgpu init` to write a tfgpu.toml.")
    elif not result.findings:
        print(f"{paint('ok', 'ok')}: {_format_files(result.files)}")
    else:
        files = f" in {_format_count(len(result.files), 'file')}" if result.files else ""
        print(f"{_format_counts(result.findings)}{files}")


def _format_files(files: Sequence[str]) -> str:
    """Return the names of the files. Of many, as in a machine layer, their number."""
    if len(files) <= _MOST_NAMES:
        return ", ".join(shorten_path(path) for path in files)
    return f"{_format_count(len(files), 'file')} in {shorten_path(os.path.commonpath(files))}"


def _format_counts(findings: Sequence[Finding]) -> str:
    counts = [(sum(finding.severity == kind for finding in findings), kind) for kind in ("error", "warning", "note")]
    return ", ".join(_format_count(count, kind) for count, kind in counts if count)


def _format_count(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"
