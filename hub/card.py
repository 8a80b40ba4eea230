"""`python -m uground.hub.card`; see [`uground.hub.publish.card`]."""

import sys

from uground.hub.publish.card import main

if __name__ == "__main__":
    sys.exit(main())
