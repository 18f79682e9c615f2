"""The embedded world and models."""

from pathlib import Path

FOLDER = Path(__file__).parent
