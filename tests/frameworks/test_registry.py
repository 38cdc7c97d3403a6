"""The registry of frameworks, and the names that the hook watches."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tfenv.frameworks import registry
from tfenv.runtime import finder


def test_the_hook_watches_the_frameworks_of_the_registry() -> None:
    """The finder may import nothing, so its names are written twice. They are the same."""
    assert registry.list_frameworks() == finder.WATCHED


@pytest.mark.parametrize("name", registry.list_frameworks())
def test_each_framework_has_the_name_it_is_registered_under(name: str) -> None:
    """It says what it supports, and what to call it."""
    framework = registry.get_framework(name)
    assert framework.name == name
    assert framework.title
    assert framework.supports <= {"growth", "limit", "limit_per_gpu", "split", "allocator", "choice"}


def test_an_unknown_name_is_a_key_error() -> None:
    """Nothing is imported for a name that is not registered."""
    with pytest.raises(KeyError):
        registry.get_framework("json")


def test_asking_for_a_framework_does_not_import_it() -> None:
    """Its module in tfenv is loaded, the framework itself is not."""
    program = "import sys; from tfenv.frameworks import registry; registry.get_framework('tensorflow').version(); "
    program += "assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-S", "-c", program], env={"PYTHONPATH": str(REPOSITORY)}, check=True)
