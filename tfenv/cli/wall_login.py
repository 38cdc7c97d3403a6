"""`tfgpu wall install` and `uninstall`: have limits for cgroups set at login, or not any more."""

from __future__ import annotations

import argparse

from tfenv.cli.output import OK, print_message
from tfenv.deploy.install import BlockChange, format_difference
from tfenv.deploy.login import needs_reload, plan_login_install, plan_login_uninstall, write_login_change


def install_login(arguments: argparse.Namespace) -> int:
    """Write what sets limits at login. Return the exit code.

    Raises:
        InstallError: It cannot be written.
    """
    change = plan_login_install()
    if change.changes_nothing:
        print_message("wall install", f"tfenv's block is already in {change.path}")
        return OK
    _carry_out(change, "wall install", f"wrote tfenv's block into {change.path}", dry_run=arguments.dry_run)
    if not arguments.dry_run:
        text = "users who are logged in now keep what they have; run `tfgpu wall apply --all` to limit them, too"
        print_message("wall install", text)
    return OK


def uninstall_login(arguments: argparse.Namespace) -> int:
    """Remove what sets limits at login. Return the exit code.

    Raises:
        InstallError: It cannot be removed.
    """
    changes = plan_login_uninstall()
    for change in changes:
        _carry_out(change, "wall uninstall", f"removed tfenv's block from {change.path}", dry_run=arguments.dry_run)
    if not changes:
        print_message("wall uninstall", "found no tfenv block for the login")
    return OK


def _carry_out(change: BlockChange, command: str, done: str, *, dry_run: bool) -> None:
    if dry_run:
        print(format_difference(change), end="")
        return
    write_login_change(change)
    print_message(command, done)
    if needs_reload(change):
        print_message(command, "run `systemctl daemon-reload`, so that systemd reads it")
