"""Fitting a model to data, and measuring it."""

from uground.extras import require_extra

require_extra("train", "uground.training")
