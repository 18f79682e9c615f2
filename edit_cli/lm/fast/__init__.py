"""Forward passes that are spared what does not change."""
