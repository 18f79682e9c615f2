"""Files that a crash leaves whole, and that are held against what they must be."""
