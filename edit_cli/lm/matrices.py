"""The weight of a module as a matrix (d_out, d_in), with what enters and leaves it as tokens.

A convolution is a projection of the patches that it looks at: its weight (channels out, channels in, height, width) is
a matrix over whole patches, and each place of its output is a token.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import unfold
from transformers.pytorch_utils import Conv1D

from edit_cli.lm.hooks import unwrapped


class Matrix:
    """Of a Linear layer, which stores it as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def widths(self) -> tuple[int, int]:
        """(d_out, d_in); also of a quantized one, whose weight has another shape."""
        return self.module.out_features, self.module.in_features  # type: ignore[return-value]

    def of(self, stored: Tensor) -> Tensor:
        """(d_out, d_in) from the weight as it is stored."""
        return stored

    def stored(self, matrix: Tensor) -> Tensor:
        """The weight as it is stored, from (d_out, d_in)."""
        return matrix

    def entering(self, x: Tensor) -> Tensor:
        """(…, d_in): what the matrix is multiplied with, of what the module is given."""
        return x

    def leaving(self, y: Tensor) -> Tensor:
        """(…, d_out): the products, of what the module returns."""
        return y

    def returned(self, products: Tensor, like: Tensor) -> Tensor:
        """What the module returns for such products; like: what it returned."""
        return products.reshape(like.shape)


class TransposedMatrix(Matrix):
    """Of Conv1D, which stores (d_in, d_out). By type, never by shape: square matrices have none to tell."""

    @property
    def widths(self) -> tuple[int, int]:
        return self.module.nf, self.module.nx  # type: ignore[return-value]

    def of(self, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.T


class PatchMatrix(Matrix):
    """Of a convolution of images (rows, channels, height, width); tokens are (rows, places, width)."""

    module: nn.Conv2d

    @property
    def widths(self) -> tuple[int, int]:
        height, width = self.module.kernel_size
        return self.module.out_channels, self.module.in_channels * height * width

    def of(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(len(matrix), self.module.in_channels, *self.module.kernel_size)

    def entering(self, x: Tensor) -> Tensor:
        module = self.module
        return unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT  # type: ignore[arg-type]

    def leaving(self, y: Tensor) -> Tensor:
        return y.flatten(2).mT

    def returned(self, products: Tensor, like: Tensor) -> Tensor:
        # laid out as images usually are: oneDNN overruns its memory in the backward pass of a convolution after others
        return products.mT.reshape(like.shape).contiguous()


def is_dense_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution of images in which every output channel sees all of a patch."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def has_matrix(module: nn.Module) -> bool:
    """Whether a module is a projection, or a convolution that is one of patches."""
    module = unwrapped(module)
    return isinstance(module, nn.Linear | Conv1D) or is_dense_convolution(module)


def matrix_of(module: nn.Module) -> Matrix:
    """How the weight of a module that `has_matrix` is one."""
    module = unwrapped(module)
    if isinstance(module, nn.Conv2d):
        return PatchMatrix(module)
    return TransposedMatrix(module) if isinstance(module, Conv1D) else Matrix(module)
