"""Commands and faces that are neither modelling nor training."""

from uground.extras import require_extra

require_extra("train", "uground.apps")
