"""For tests of methods, in this package and in plug-ins (docs/adding-a-method.md). Needs pytest."""

from edit_cli.testing.conformance import MethodConformance
from edit_cli.testing.parts import (
    embedded_lm,
    facts,
    likelihoods,
    linear_twin,
    packaged_method,
    same_bits,
    snapshot,
)

__all__ = [
    "MethodConformance",
    "embedded_lm",
    "facts",
    "likelihoods",
    "linear_twin",
    "packaged_method",
    "same_bits",
    "snapshot",
]
