"""``python -m benchmarks.quality.peers``."""

from .run import main

if __name__ == "__main__":
    main()
