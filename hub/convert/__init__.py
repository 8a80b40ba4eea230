"""What the converters know of the layouts of others."""
