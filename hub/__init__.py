"""Weights of others in, checkpoints out."""

from uground.extras import require_extra

require_extra("train", "uground.hub")
