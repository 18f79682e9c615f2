"""Trained editors: MEND, MALMEN, KE, ENN, and what they share."""
