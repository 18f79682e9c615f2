"""Feed-forward layers as key–value memories (Geva et al., 2021): which texts fire a key, what its value promotes, how a
layer's output is composed, how residuals refine it, and what an edit has changed of all that.

A layer's output is Σ m_i v_i: v_i is a column of the MLP's output projection, m_i what enters it there. So m_i is
f(k_i · x) in a plain MLP, and act(g_i · x)(u_i · x) in a gated one, whose keys are pairs.

prefixes: text; triggers: what fires keys, kept while text streams by; patterns: what triggers have in common;
vocabulary: what a vector promotes; layers: composition and refinement; changes: an edit.
"""
