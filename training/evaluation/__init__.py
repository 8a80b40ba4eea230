"""Measuring: predictions, protocols and counts, the store of a run, figures during training."""
