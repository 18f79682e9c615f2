"""Second moments of keys, and the text that they come from."""
