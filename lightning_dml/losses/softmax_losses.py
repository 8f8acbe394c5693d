"""Named losses of the softmax family."""

from __future__ import annotations

from lightning_dml.losses.base import LossOptions, PairWeightingLoss, Unpack
from lightning_dml.losses.weighting.softmax import (
    NCAWeighting,
    NPairWeighting,
    PositivesReduction,
    SupConWeighting,
    TupletMarginWeighting,
    check_temperature,
)


class NPairLoss(PairWeightingLoss):
    r"""N-pair loss, each positive against all negatives of its anchor (formula of pytorch-metric-learning's docs).

    .. math::
        L_i = \frac{1}{|P_i|} \sum_{j \in P_i} \log\Big[1 + \sum_{k \in N_i} e^{s (S_{ik} - S_{ij})}\Big]

    With :math:`p^{(j)}` the softmax of :math:`s S` over positive j and all negatives, the weights are
    :math:`w^+_{ij} = s (1 - p^{(j)}_j) / |P_i|` and :math:`w^-_{ik} = s \sum_j p^{(j)}_k / |P_i|`. An anchor without
    positives or without negatives has no loss.

    Two things are ours. The loss was made for rows that are not normalised; on unit rows S lies in [-1, 1], too
    narrow for a softmax, so there is a scale. And all positives and negatives of an anchor take part, where the loss
    as published draws one pair of each class; a batch of one pair of each class against its positives is the same.

    Args:
        scale: s; our choice.
        positives: `mean` averages over the positives of an anchor, `sum` adds them up (without the 1/|P|).
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.

    Raises:
        InputError: for a scale that is not positive, or an unknown `positives`.
    """

    def __init__(
        self,
        scale: float = 16.0,
        *,
        positives: PositivesReduction = "mean",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(NPairWeighting(scale, positives=positives), **options)


class NTXentLoss(PairWeightingLoss):
    r"""Normalised temperature-scaled cross entropy, InfoNCE, one term for each positive.

    .. math::
        L_i = \frac{1}{|P_i|} \sum_{j \in P_i}
            -\log \frac{e^{S_{ij} / \tau}}{e^{S_{ij} / \tau} + \sum_{k \in N_i} e^{S_{ik} / \tau}}

    The other positives of the anchor are not in the denominator, as in pytorch-metric-learning; see `SupConLoss` for
    the form that has them. It is `NPairLoss` with :math:`s = 1 / \tau`, and has its weights. An anchor without
    positives or without negatives has no loss.

    Args:
        temperature: :math:`\tau`; 0.07 in pytorch-metric-learning.
        positives: `mean` averages over the positives of an anchor, `sum` adds them up (without the 1/|P|).
            pytorch-metric-learning averages over the positive pairs of the batch, which is `mean` where all anchors
            have equally many.
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.

    Raises:
        InputError: for a temperature that is not positive, or an unknown `positives`.

    Examples:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> loss = NTXentLoss(temperature=1.0)
        >>> round(float(loss(embeddings, torch.tensor([0, 0, 1]))), 4)  # (log(1 + e^-0.8) + log(1 + e^-0.2) + 0) / 3
        0.3231
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        positives: PositivesReduction = "mean",
        **options: Unpack[LossOptions],
    ) -> None:
        check_temperature(temperature)
        super().__init__(NPairWeighting(1 / temperature, positives=positives), **options)
        self.temperature = temperature

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"temperature={self.temperature}, {super().extra_repr()}"


class TupletMarginLoss(PairWeightingLoss):
    r"""Tuplet margin loss: the N-pair loss with a margin on the angle of the positive.

    .. math::
        L_i = \frac{1}{|P_i|} \sum_{j \in P_i}
            \log\Big[1 + \sum_{k \in N_i} e^{s (S_{ik} - \cos(\theta_{ij} - \beta))}\Big], \quad \cos \theta = S

    Formula and constants as in pytorch-metric-learning. The weights are those of `NPairLoss` with
    :math:`\cos(\theta_{ij} - \beta)` for :math:`S_{ij}`, and on positives the factor
    :math:`\sin(\theta_{ij} - \beta) / \sin \theta_{ij}` as well: it is negative for positives at a smaller angle than
    the margin, which are pushed apart up to it. At S = 1 and -1 the factor is infinite, so (ours) where
    :math:`\sin \theta` in :math:`\cos(\theta - \beta) = \cos \theta \cos \beta + \sin \theta \sin \beta` is less than
    2e-3 it is 2e-3, and the factor is :math:`\cos \beta`.

    Args:
        scale: s.
        margin: :math:`\beta` in degrees; 5.73 is 0.1 rad.
        positives: `mean` averages over the positives of an anchor, `sum` adds them up (without the 1/|P|).
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.

    Raises:
        InputError: for a scale that is not positive, a margin outside [0, 90], or an unknown `positives`.
    """

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 5.73,
        *,
        positives: PositivesReduction = "mean",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(TupletMarginWeighting(scale, margin, positives=positives), **options)


class SupConLoss(PairWeightingLoss):
    r"""Supervised contrastive loss, the form with the sum outside the logarithm (as in the authors' SupContrast code).

    .. math::
        L_i = -\frac{1}{|P_i|} \sum_{j \in P_i}
            \log \frac{e^{S_{ij} / \tau}}{\sum_{a \in P_i \cup N_i} e^{S_{ia} / \tau}}

    With p the softmax over positives and negatives, the signed weights :math:`dL / dS` are :math:`p_k / \tau` on
    negatives and :math:`(p_j - 1 / |P_i|) / \tau` on positives: a positive with more than its share is pushed away. An
    anchor without positives has no loss; one without negatives has the loss of its positives alone.

    Args:
        temperature: :math:`\tau`; 0.1 in the paper. The code has 0.07 and multiplies the loss by :math:`\tau / 0.07`.
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.

    Raises:
        InputError: for a temperature that is not positive.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(SupConWeighting(temperature), **options)


class NCALoss(PairWeightingLoss):
    r"""Neighbourhood components analysis: the probability that a soft nearest neighbour is a positive.

    .. math::
        L_i = -\log \frac{\sum_{j \in P_i} e^{s S_{ij}}}{\sum_{a \in P_i \cup N_i} e^{s S_{ia}}}

    With p the softmax over positives and negatives, and q that over the positives alone, the weights are
    :math:`w^+_{ij} = s (1 - \sum_P p)\, q_j`, which favours the easy positives, and :math:`w^-_{ik} = s\, p_k`. An
    anchor without positives or without negatives has no loss.

    Args:
        scale: s. pytorch-metric-learning takes minus its `softmax_scale` times squared distances, and
            :math:`d^2 = 2 - 2 S`, so s is twice its `softmax_scale`.
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.

    Raises:
        InputError: for a scale that is not positive.
    """

    def __init__(
        self,
        scale: float = 2.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(NCAWeighting(scale), **options)
