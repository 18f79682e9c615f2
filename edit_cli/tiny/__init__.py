"""The embedded tiny GPT-2 and its invented world: how both are made.

`python -m edit_cli.tiny world` makes the shipped assets, `python -m edit_cli.tiny records FILE` trains a small
model on the true facts of any CounterFact-style file. See docs/tiny-model.md.
"""
