"""Named losses on the ranked list of an anchor."""

from __future__ import annotations

from lightning_dml.losses.base import LossOptions, PairWeightingLoss, Unpack
from lightning_dml.losses.weighting.ranking import FastAPWeighting, RankedListWeighting


class RankedListLoss(PairWeightingLoss):
    r"""Ranked list loss (arXiv 1903.03238; formula of pytorch-metric-learning's documentation).

    .. math::
        L_i = (1 - \lambda) \sum_{j \in P_i^*} w_{ij} \big(d_{ij} - (\alpha - m)\big)
            + \lambda \sum_{k \in N_i^*} w_{ik} (\alpha - d_{ik}), \quad d = \sqrt{2 - 2 S}

    over the non-trivial pairs, positives with :math:`d > \alpha - m` and negatives with :math:`d < \alpha`. The w of
    each side are :math:`e^{T d}` on positives and :math:`e^{-T d}` on negatives, normalised to sum to 1 over the
    side's non-trivial pairs (in log space, so that no temperature overflows) and held constant. The weights with
    respect to S are :math:`(1 - \lambda) w / d` and :math:`\lambda w / d`, 0 nearer than 2e-3, where d is clamped.
    pytorch-metric-learning 2.9 has the gradient flow through w and adds 1e-5 for each column to its sums: the values
    agree to about that, the gradients differ unless both temperatures are 0.

    Args:
        margin: m, the gap between the boundaries of positives and negatives.
        alpha: the boundary of negatives, a distance; pytorch-metric-learning's is :math:`1 + m / 2`.
        neg_temperature: T on negatives; larger means the nearest get more of the weight, 0 means all alike.
        pos_temperature: T on positives.
        balance: the share :math:`\lambda` of the negatives.
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.
            The non-trivial pairs are found without a miner.

    Raises:
        InputError: for a negative margin or temperature, a boundary that is not positive, a balance outside [0, 1].
    """

    def __init__(
        self,
        margin: float = 0.4,
        alpha: float = 1.2,
        *,
        neg_temperature: float = 10.0,
        pos_temperature: float = 0.0,
        balance: float = 0.5,
        **options: Unpack[LossOptions],
    ) -> None:
        weighting = RankedListWeighting(
            margin, alpha, neg_temperature=neg_temperature, pos_temperature=pos_temperature, balance=balance
        )
        super().__init__(weighting, **options)


class FastAPLoss(PairWeightingLoss):
    r"""FastAP, average precision over histograms of squared distances (code: kunhe/FastAP-metric-learning).

    .. math::
        L_i = 1 - \frac{1}{|P_i|} \sum_{l=0}^{L} \frac{h_l^+ H_l^+}{H_l}

    where :math:`h_l^+` and :math:`h_l^-` are histograms of :math:`d^2 = 2 - 2 S` of positives and negatives with
    triangular bins around :math:`L + 1` centres from 0 to 4, :math:`H` their cumulative sums, and
    :math:`H_l = H_l^+ + H_l^-`. Between two centres :math:`l` and :math:`l + 1` the weights are constant:

    .. math::
        w^- = \frac{L}{2 |P_i|} \frac{h_l^+ H_l^+}{H_l^2}, \quad
        w^+ = \frac{L}{2 |P_i|} \Big(\frac{H_l^+}{H_l} - \frac{H_{l+1}^+}{H_{l+1}} + \frac{h_l^+ H_l^-}{H_l^2}\Big)

    (this form is ours, derived from the one in the source). A pair exactly on a centre gets the weight of the cell
    of larger distances, that of opposite vectors (S = -1) the last cell's. An anchor without positives has no loss.

    Args:
        bins: L, the number of cells between 0 and 4; 10 in the source.
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.
            With a miner, precision is that among the kept pairs.

    Raises:
        InputError: if `bins` is not a positive integer.
    """

    def __init__(
        self,
        bins: int = 10,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(FastAPWeighting(bins), **options)
