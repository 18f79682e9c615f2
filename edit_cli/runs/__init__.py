"""Run directories, and what makes a run the same run."""
