"""Asking whether the hook is there, and arming it late."""

from __future__ import annotations

from tests.environments import ROOT, Environment

ASK = "import json; from tfenv.runtime import arming; armed = arming.is_armed(); "
TELL = "print(json.dumps([armed, arming.is_armed(), arming.get_start().get('TFGPU_CONFIG')]))"


def test_armed_at_start(armed: Environment) -> None:
    """In an environment that has the wheel the hook is armed, and remembers the start."""
    program = f"import os; os.environ['TFGPU_CONFIG'] = 'later'; {ASK} arming.arm(); {TELL}"
    assert armed.story(program, env={"TFGPU_CONFIG": "first"}) == [True, True, "first"]


def test_armed_late_without_site(armed: Environment) -> None:
    """Where no .pth is read, the hook can be armed by hand, and remembers that moment."""
    program = f"import sys; sys.path.append({str(armed.site_packages)!r}); {ASK} arming.arm(); arming.arm(); {TELL}"
    assert armed.story(program, "-S", env={"TFGPU_CONFIG": "first"}) == [False, True, "first"]


def test_armed_late_from_a_checkout(bare: Environment) -> None:
    """A checkout on PYTHONPATH, nothing installed: asking does not arm, arming does."""
    assert bare.story(f"{ASK} {TELL}", env={"PYTHONPATH": str(ROOT)}) == [False, False, None]
    program = f"{ASK} arming.arm(); {TELL}"
    assert bare.story(program, env={"PYTHONPATH": str(ROOT), "TFGPU_CONFIG": "x"}) == [False, True, "x"]
