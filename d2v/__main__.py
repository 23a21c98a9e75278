"""`python -m d2v` is `d2v`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
