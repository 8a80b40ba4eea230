"""`python -m uground.hub.publish`."""

import sys

from uground.hub.publish.publishing import main

if __name__ == "__main__":
    sys.exit(main())
