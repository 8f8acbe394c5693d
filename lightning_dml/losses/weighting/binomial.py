"""The weighting of the binomial deviance loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dml.checks import check_number
from lightning_dml.losses.weighting.base import ChunkedWeighting
from lightning_dml.losses.weighting.rows import LEAST_EXPONENT, Positives, softplus


class BinomialWeighting(ChunkedWeighting):
    """Sigmoid weights, averaged over the kept pairs of each side; see `BinomialDevianceLoss`."""

    def __init__(self, alpha: float = 2.0, beta: float = 40.0, base: float = 0.5) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_number(name, value, "the sharpness of a sigmoid such as 2.0", above=0)
        check_number("base", base, "a similarity such as 0.5")
        self.alpha = alpha
        self.beta = beta
        self.base = base

    def chunk(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Row losses (n,) and weights (n, M) in closed form."""
        pairs = Positives.of(similarity, positive)
        # As bytes: counting bools takes several times as long.
        counts = negative.view(torch.uint8).sum(dim=1, dtype=torch.int32).clamp_(min=1).to(similarity.dtype)
        left_out = ~negative
        excess = similarity.sub_(self.base).mul_(self.beta)
        excess.masked_fill_(left_out, LEAST_EXPONENT).clamp_min_(LEAST_EXPONENT)
        # softplus(x), in a third of its time: [x]+ - log sigmoid(|x|).
        losses = (excess.relu().sum(dim=1) - excess.abs().sigmoid_().log_().sum(dim=1)).div_(counts)
        weights = excess.sigmoid_().mul_((self.beta / counts)[:, None]).masked_fill_(left_out, 0)

        shortfall = (self.base - pairs.values) * self.alpha
        share = pairs.counts.to(similarity.dtype).reciprocal()[pairs.row]
        weights[pairs.row, pairs.column] = torch.sigmoid(shortfall) * share * -self.alpha
        return losses.add_(pairs.sums(softplus(shortfall) * share)), weights

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}"
