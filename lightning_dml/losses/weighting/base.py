"""What every pairs weighting is: row losses, and their derivative by the similarities."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Weighting(nn.Module):
    """Row losses and pair weights of a block of the similarity matrix.

    A subclass gives either `row_losses` alone, the textbook formula, which is then differentiated by autograd
    block by block, or `forward` with a closed form of the derivative as well.
    """

    def row_losses(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Loss of each anchor.

        Args:
            similarity: (n, M) float32 or float64.
            positive: (n, M) bool, the kept positives.
            negative: (n, M) bool, the kept negatives.

        Returns:
            (n,), differentiable with respect to `similarity`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define row_losses or forward")

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and their derivative with respect to the similarities, (n, M), of the same dtype."""
        with torch.enable_grad():
            leaf = similarity.detach().requires_grad_()
            losses = self.row_losses(leaf, positive, negative)
            if not losses.requires_grad:  # no pair took part
                return losses, torch.zeros_like(similarity)
            (weights,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), weights
