"""Causal tracing (Meng et al., 2022, section 2): which states of a forward pass carry a fact.

The subject's embeddings are corrupted with noise; then single clean states are put back, and the answer's probability
tells which of them matter. facts: where tokens lie; restore: the passes; averages: effects by layer and token role, and
layers to edit.
"""
