"""edit-cli: an experiment runner for editing the knowledge of language models."""

__version__ = "0.1.0"
