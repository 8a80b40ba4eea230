"""`python -m uground.hub.closure`; see [`uground.hub.publish.closure`]."""

import sys

from uground.hub.publish.closure import main

if __name__ == "__main__":
    sys.exit(main())
