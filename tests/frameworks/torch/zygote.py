"""A program under test: imports PyTorch once, then forks a child for each line of orders on stdin.

Started by `conftest`. An order is {"number": n, "steps": [...]}, and the steps are functions of `ways`. What became of
the child is in the files `<number>.*`, as `tests.frameworks.zygote` writes them, before its number is printed.
Importing first and forking afterwards is itself one of the promises under test.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Serve orders until stdin ends."""
    sys.path.append(str(Path(__file__).parents[3]))
    from tests.frameworks.zygote import child, reap

    import ways  # type: ignore[import-not-found]  # imports PyTorch: the folder of this script is on sys.path

    folder = Path.cwd()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                child(folder, order["number"], ways, order["steps"])
            finally:
                os._exit(70)
        reap({pid: order["number"]}, folder)
        print(order["number"], flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
