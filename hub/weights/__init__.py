"""Files of weights: reading them one tensor at a time, naming, writing whole or not at all."""
