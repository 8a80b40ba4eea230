"""`python -m uground.training.scenes`."""

import sys

from uground.training.scenes.world import main

if __name__ == "__main__":
    sys.exit(main())
