"""Readers of what annotation tools write: files become annotated pictures, and what is left out is said."""
