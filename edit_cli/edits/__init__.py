"""Edits as values: what they are, and how they lie on disk."""
