"""`python -m tfenv` is `tfgpu`."""

import os
import sys


def _leave_current_directory() -> None:
    """Take the current directory off sys.path, where `python -m` put it: its files may be a stranger's."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return
    if sys.path[:1] in ([""], [here]):
        del sys.path[0]


if __name__ == "__main__":
    _leave_current_directory()
    from tfenv.cli.main import main

    sys.exit(main())
