"""BLUE (Li et al., 2025): only the first and the last critical layer are written, each towards targets of its own."""

from __future__ import annotations

from edit_cli.editors.locate.memit import MEMIT, MEMITConfig


class BLUE(MEMIT[MEMITConfig]):
    """MEMIT whose residual is not distributed, since layers in between hardly contribute.

    At the first of `layers`, and then at the last on the model that this leaves: optimize targets at that very layer
    and write the whole residual there.
    """

    def rounds(self, layers: list[int]) -> list[list[int]]:
        """The boundary layers, one a round."""
        return [[layer] for layer in dict.fromkeys((layers[0], layers[-1]))]
