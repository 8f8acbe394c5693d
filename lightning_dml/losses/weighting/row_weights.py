"""Sides of a direct weighting that come from another loss: functions of the whole row, not of one similarity."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_dml.errors import InputError
from lightning_dml.losses.mining import Miner
from lightning_dml.losses.weighting.base import Weighting


class RowWeights(nn.Module):
    """Signed weights of a row of pairs, of which a direct weighting takes the positives or the negatives.

    Attributes:
        separable: whether any part of a row will do; see `Weighting`.
    """

    separable: bool = False

    def columns(self, references: int) -> tuple[int, int]:
        """Counts of the numbers it needs beside the similarities: for each anchor, and for each reference."""
        return 0, 0

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor, own: Tensor, everyone: Tensor) -> Tensor:
        """Weights dL/dS of a block.

        Args:
            similarity: (n, M), which stays as it is.
            positive: (n, M) bool, the positives that the direct weighting's miner keeps.
            negative: (n, M) bool.
            own: (n, a) what `columns` asks for of each anchor.
            everyone: (M, r) the same of each reference.

        Returns:
            (n, M), 0 where there is no pair, in memory of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")


class LossWeights(RowWeights):
    """The weights of one of our losses: its weighting, over the pairs that its own miner keeps.

    Args:
        weighting: of the loss.
        miner: of the loss; None keeps all.
    """

    def __init__(self, weighting: Weighting, miner: Miner | None = None) -> None:
        super().__init__()
        self.weighting = weighting
        self.miner = miner
        self.separable = weighting.separable and (miner is None or miner.separable)

    @property
    def coupled(self) -> bool:
        """Tells whether the weighting needs a number of other anchors' rows."""
        return type(self.weighting).row_statistics is not Weighting.row_statistics

    def columns(self, references: int) -> tuple[int, int]:
        """One number for each anchor and reference where the weighting has a row statistic, else none."""
        return (1, 1) if self.coupled else (0, 0)

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor, own: Tensor, everyone: Tensor) -> Tensor:
        """Weights of a block; see `RowWeights.forward`."""
        if self.miner is not None:
            positive, negative = self.miner(similarity, positive, negative)
        statistics = ((own[:, 0], everyone[:, 0]),) if self.coupled else ()
        # A weighting may write over its similarities, and the other side and the value still need them.
        _, weights = self.weighting(similarity.clone(), positive, negative, *statistics)
        return weights.detach()  # type: ignore[no-any-return]


class MeasuredWeights(RowWeights):
    """The weights of another library's loss, which come as numbers: it tells them for a whole batch at once only.

    Args:
        loss: any module called `loss(embeddings, labels[, ref_emb=..., ref_labels=...])`.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def columns(self, references: int) -> tuple[int, int]:
        """A weight for each pair: as many numbers for each anchor as there are references."""
        return references, 0

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor, own: Tensor, everyone: Tensor) -> Tensor:
        """Weights of a block; see `RowWeights.forward`."""
        return own.to(similarity.dtype).masked_fill(~(positive | negative), 0)


def check_frozen(name: str, side: object) -> None:
    """Raises `InputError` for a side with parameters that are to be trained."""
    if isinstance(side, nn.Module) and any(parameter.requires_grad for parameter in side.parameters()):
        raise InputError(
            f"{name} has parameters that require a gradient, but weights are held constant: "
            "freeze them with requires_grad_(False)"
        )
