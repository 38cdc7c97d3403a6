"""`python -m tfenv` is `tfgpu`."""

import sys

from tfenv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
