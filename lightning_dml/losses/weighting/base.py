"""The interface of pairs weighting: row losses, and their derivative by the similarities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Weighting(nn.Module):
    """Row losses and pair weights of a block of the similarity matrix.

    A subclass gives either `row_losses` alone, the textbook formula, which is then differentiated by autograd
    block by block, or `forward` with a closed form of the derivative as well. One with learnable parameters needs
    `row_losses`.

    Attributes:
        separable: whether loss and weight of a pair depend on its own similarity alone. The engine then passes any
            part of a row and adds up the row losses.
    """

    separable: bool = False

    def row_losses(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Loss of each anchor.

        Args:
            similarity: (n, M) float32 or float64.
            positive: (n, M) bool, the kept positives.
            negative: (n, M) bool, the kept negatives.

        Returns:
            (n,), differentiable with respect to `similarity` and to parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} must define row_losses or forward")

    def row_statistics(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor | None:
        """A number for each anchor, (n,), that other anchors' rows need too; None where rows are independent.

        The engine computes it for all anchors in a first sweep and hands it to `forward`. Only in-batch losses can
        have it, where each reference is an anchor as well.
        """
        return None

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and their derivative with respect to the similarities, (n, M), of the same dtype.

        `similarity` is the engine's to lose: a closed form may overwrite it and return it as the weights.

        Where `row_statistics` returns some, they come as a fourth argument: those of the block's anchors (n,) and
        those of all references (M,).
        """
        losses, (weights,) = self._differentiate(similarity, positive, negative, ())
        return losses, weights

    def with_parameters(
        self, similarity: Tensor, positive: Tensor, negative: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """`forward`, and the gradient of the summed row losses for each of the module's `parameters`."""
        losses, (weights, *gradients) = self._differentiate(similarity, positive, negative, parameters)
        return losses, weights, gradients

    def _differentiate(
        self, similarity: Tensor, positive: Tensor, negative: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            leaf = similarity.detach().requires_grad_()
            inputs = [leaf, *parameters]
            losses = self.row_losses(leaf, positive, negative)
            if not losses.requires_grad:  # no pair took part
                return losses, [torch.zeros_like(leaf) for leaf in inputs]
            gradients = torch.autograd.grad(losses.sum(), inputs, allow_unused=True, materialize_grads=True)
        return losses.detach(), list(gradients)


class ChunkedWeighting(Weighting):
    """A weighting that takes a few rows of its block at a time.

    Its temporaries are then small, and stay in the processor's cache between the many passes over them.
    """

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        step = _rows_per_chunk(similarity)
        if step >= len(similarity):
            return self.chunk(similarity, positive, negative)
        losses = similarity.new_zeros(len(similarity))
        for start in range(0, len(similarity), step):
            rows = slice(start, start + step)
            # In place: the block itself becomes the weights, and no memory is fresh.
            losses[rows], similarity[rows] = self.chunk(similarity[rows], positive[rows], negative[rows])
        return losses, similarity

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses and weights of a chunk of rows; see `forward`."""
        raise NotImplementedError(f"{type(self).__name__} must define chunk(similarity, positive, negative)")


def _rows_per_chunk(similarity: Tensor) -> int:
    # On a CPU a chunk fits the second-level cache; on an accelerator each operation should be worth its launch.
    elements = 2**22 if similarity.is_cuda else 2**19
    return max(1, elements // max(1, similarity.shape[1]))
