"""Where a weight is, and how another value takes its place."""
