"""Readers of what annotation tools write: a file or folder becomes annotated pictures, and what is left out is said."""
