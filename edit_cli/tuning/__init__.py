"""Searching for a method's settings on one model: what is searched, what counts as good, and who proposes."""
