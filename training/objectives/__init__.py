"""Losses of a training step, and what rewards are held against: tensors in, named terms out."""
