"""`tfgpu check`: find the mistakes in policy files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tfenv.cli.output import add_format, exit_code, finding_as_dict, paint, print_findings, print_json, shown_path
from tfenv.errors import Finding
from tfenv.lint.check import CheckResult, check_here, check_path

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["add_parser", "run"]

#: Files that are told by name when all is well.
_MOST_NAMES = 5


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "check",
        help="find the mistakes in policy files",
        description="Find the mistakes in policy files, and what is right but hardly meant. "
        "Exit codes: 0 no mistake, 1 findings.",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH",
        help="a tfgpu.toml, a pyproject.toml, or a directory such as /etc/tfgpu; without any: all that have a say here",
    )  # fmt: skip
    parser.add_argument(
        "--table-optional", action="store_true",
        help="a pyproject.toml without [tool.tfgpu] is no mistake (pre-commit names every one that changed)",
    )  # fmt: skip
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Check the files; 1 when there is an error or a warning."""
    named = [check_path(path, table_optional=args.table_optional) for path in args.paths]
    checked = sum(named, CheckResult()) if args.paths else check_here()
    if args.format == "json":
        findings = [finding_as_dict(finding) for finding in checked.findings]
        print_json({"files": list(checked.files), "findings": findings})
    else:
        _print_text(checked)
    return exit_code(checked.findings)


def _print_text(checked: CheckResult) -> None:
    print_findings(checked.findings)
    if not checked.findings and not checked.files:
        print("No policy file has a say here. `tfgpu init` writes a first tfgpu.toml.")
    elif not checked.findings:
        print(f"{paint('ok', 'ok')}: {_named(checked.files)}")
    else:
        files = f" in {_counted(len(checked.files), 'file')}" if checked.files else ""
        print(f"{_tally(checked.findings)}{files}")


def _named(files: Sequence[str]) -> str:
    """The files by name; those of a whole machine layer by number."""
    if len(files) <= _MOST_NAMES:
        return ", ".join(shown_path(path) for path in files)
    return f"{_counted(len(files), 'file')} in {shown_path(os.path.commonpath(files))}"


def _tally(findings: Sequence[Finding]) -> str:
    counts = [(sum(finding.severity == kind for finding in findings), kind) for kind in ("error", "warning", "note")]
    return ", ".join(_counted(count, kind) for count, kind in counts if count)


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"
