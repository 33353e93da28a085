"""``python -m alds_fast`` is ``alds-fast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
