"""Named losses on triplets."""

from __future__ import annotations

from lightning_dml.errors import InputError
from lightning_dml.losses.base import LossOptions, PairWeightingLoss, Unpack
from lightning_dml.losses.measure import Measure, check_measure
from lightning_dml.losses.weighting.triplet import SoftTripletWeighting, TripletWeighting

DEFAULT_MARGINS: dict[Measure, float] = {"similarity": 0.1, "distance": 0.2, "squared_distance": 0.2}
"""Margin of each measure where none is given."""


class TripletLoss(PairWeightingLoss):
    r"""Triplet loss over all triplets of an anchor.

    .. math::
        L_i = \sum_{j \in P_i} \sum_{k \in N_i} [S_{ik} - S_{ij} + M]_+, \quad
        [d_{ij} - d_{ik} + M]_+, \quad [d_{ij}^2 - d_{ik}^2 + M]_+
        \quad\text{or}\quad \tfrac{1}{s} \log(1 + e^{s (S_{ik} - S_{ij})})

    by `measure`, or with a soft margin by `scale`. The weight of a pair is the number of its violated triplets, times
    :math:`1 / d` for distances (0 nearer than 2e-3, where d is clamped) and 2 for squared distances; with a soft
    margin it is :math:`\sum \sigma(s (S_{ik} - S_{ij}))` over its triplets. No triplet is listed: counts come from
    sorting the positives of a row, in O(M) memory per row. The soft margin needs time for every triplet.

    Args:
        margin: M, in the units of the measure. None means 0.2 for distances, as in the code of Revisiting DML, and,
            which is ours, 0.2 for squared distances and 0.1 for similarities; these two have the same triplets.
        measure: what a triplet compares: `similarity`, `distance` or `squared_distance` of unit vectors. FaceNet has
            the squared distance, the code of Revisiting DML the distance: set `squared_distance` or `distance` for
            their forms. With a soft margin minus the distance, or twice S, takes the place of S.
        scale: s of a soft margin, which takes the place of the margin.
        **options: `miner`, `reduction`, `gather`, `block_bytes` and `validate`, by name; see `PairWeightingLoss`.
            A mean over triplets is not among the reductions.

    Raises:
        InputError: for an unknown measure, a negative margin, a scale that is not positive, or a margin and a scale.

    Examples:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
        >>> loss = TripletLoss(margin=0.1)
        >>> round(float(loss(embeddings, torch.tensor([0, 0, 1]))), 4)  # (0.8 - 0.6 + 0.1) + (0.96 - 0.6 + 0.1), over 3
        0.2533
    """

    def __init__(
        self,
        margin: float | None = None,
        *,
        measure: Measure = "similarity",
        scale: float | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        check_measure(measure)
        weighting: TripletWeighting | SoftTripletWeighting
        if scale is None:
            weighting = TripletWeighting(DEFAULT_MARGINS[measure] if margin is None else margin, measure=measure)
        elif margin is None:
            weighting = SoftTripletWeighting(scale, measure=measure)
        else:
            raise InputError(
                f"margin and scale exclude each other, got margin={margin} and scale={scale}: "
                "leave out scale for a hinge, or margin for a soft margin"
            )
        super().__init__(weighting, **options)
