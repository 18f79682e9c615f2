"""Training editors: one loop for all of them, alone or spread over processes."""
