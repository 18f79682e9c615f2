"""Memories beside one module: GRACE, DEFER, MELO, WISE, T-Patcher."""
