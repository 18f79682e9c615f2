"""The embedded tiny GPT-2 and its invented world: how both are made.

`python -m tools.tiny_world world` makes the shipped assets, `python -m tools.tiny_world records FILE` trains a small
model on the true facts of any CounterFact-style file. See docs/tiny-model.md.
"""
