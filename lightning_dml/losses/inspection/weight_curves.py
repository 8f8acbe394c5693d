"""Weight curves of any loss: the weight of a pair against its similarity, positives and negatives apart.

The method is that of arXiv 2103.14003, after its abstract, for losses whose weights are chosen; that a loss on whole
rows gets a curve at a stated context is this library's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from lightning_dml.checks import check_number
from lightning_dml.errors import InputError
from lightning_dml.losses.base import PairWeightingLoss
from lightning_dml.losses.curves import Constant
from lightning_dml.losses.engine import drawing_again
from lightning_dml.losses.inspection.measured import measured_weights
from lightning_dml.losses.mining import SampledMiner
from lightning_dml.losses.weighting import DirectWeighting, Weighting
from lightning_dml.losses.weighting.row_weights import LossWeights, MeasuredWeights

DRAWS = 256
"""How often a miner that draws is asked for each similarity; the curve is the mean."""


@dataclass(frozen=True)
class Context:
    """The other pairs of the anchor whose pair a weight curve is about.

    Attributes:
        positives: similarities of the anchor's other positives.
        negatives: similarities of its other negatives.

    The defaults are ours: four samples of a class, and negatives from far to hard.

    Raises:
        InputError: for a similarity outside [-1, 1].

    Examples:
        >>> print(Context())
        3 positives at 0.6, 8 negatives from -0.2 to 0.5
    """

    positives: Sequence[float] = (0.6, 0.6, 0.6)
    negatives: Sequence[float] = (-0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)

    def __post_init__(self) -> None:
        for field in fields(self):
            values = tuple(map(float, getattr(self, field.name)))
            for value in values:
                check_number(f"{field.name} of Context", value, "cosine similarities such as 0.5", least=-1, most=1)
            object.__setattr__(self, field.name, values)

    def __str__(self) -> str:
        return f"{_in_words(self.positives, 'positive')}, {_in_words(self.negatives, 'negative')}"


ALONE = Context((), ())
"""No other pair: the context of losses that look at none."""

# As many pairs in each, at similarities that differ: what tells whether a loss looks at them.
_CONTRASTS = (
    Context((0.9, 0.8, 0.7), (-0.9, -0.8, -0.7, -0.6)),
    Context((-0.5, -0.6, -0.7), (0.95, 0.9, 0.85, 0.8)),
    Context((0.5, 0.2, -0.1), (0.6, 0.3, 0.1, -0.3)),
)


def weight_curve(loss: nn.Module, similarity: Tensor, *, context: Context | None = None) -> tuple[Tensor, Tensor]:
    r"""Weights that a loss gives a pair at each similarity: :math:`w^+ = -dL/dS` and :math:`w^- = dL/dS`.

    Every similarity is an anchor of its own, whose row is the pair at that similarity and the pairs of the context.
    Weights are those per anchor: of our losses without the reduction, of another library's with its own reduction
    over the one anchor, and at S = 1 those a step of 1e-7 away. They are signed: a positive that is pushed away has a
    negative :math:`w^+`. A miner that draws is asked 256 times, from where its stream stands, and put back; the weight
    is then the mean, with pairs that are not kept as 0.

    Args:
        loss: one of ours, or any module called `loss(embeddings, labels, ref_emb=..., ref_labels=...)`.
        similarity: (n,) float; of another library's loss within [-1, 1].
        context: the anchor's other pairs. None means none for a loss that is `context_free`, else `Context()`.

    Returns:
        Positive and negative weights, (n,) float64 each.

    Raises:
        InputError: for similarities of another shape, and for a loss without weights of the pairs of an anchor: one
            with proxies, or one whose rows are coupled.

    Examples:
        >>> from lightning_dml.losses import ContrastiveLoss
        >>> weight_curve(ContrastiveLoss(margin=0.5), torch.tensor([0.4, 0.6]))
        (tensor([1., 1.], dtype=torch.float64), tensor([0., 1.], dtype=torch.float64))
    """
    if similarity.ndim != 1 or not similarity.is_floating_point() or not bool(torch.isfinite(similarity).all()):
        raise InputError(
            f"similarity must be finite floats of shape (n,), got {similarity.dtype} {tuple(similarity.shape)}"
        )
    similarity = similarity.detach().double()
    if context is None:
        context = ALONE if context_free(loss) else Context()
    # Not -0.0 where there is no weight.
    return 0 - _probe(loss, similarity, context, True), _probe(loss, similarity, context, False)


def context_free(loss: nn.Module) -> bool:
    """Tells whether a pair's weight depends on no similarity but its own.

    Our losses on single pairs say so; of all others the curves at three different contexts, with as many pairs each,
    are compared. A loss that divides by the number of pairs alone (binomial deviance) is thus context-free.

    Raises:
        InputError: see `weight_curve`.
    """
    if isinstance(loss, PairWeightingLoss):
        if loss.miner is not None and not loss.miner.separable:
            return False
        if loss.weighting.separable:
            return True
    probes = torch.linspace(-0.95, 0.95, 13, dtype=torch.float64)
    curves = [torch.cat(weight_curve(loss, probes, context=context)) for context in _CONTRASTS]
    return all(torch.allclose(curves[0], curve, rtol=1e-6, atol=1e-9) for curve in curves[1:])


def draws_pairs(loss: nn.Module) -> bool:
    """Tells whether a miner of the loss draws among the pairs, so that its curve is a mean of `DRAWS` draws."""
    return any(isinstance(module, SampledMiner) for module in loss.modules())


def _probe(loss: nn.Module, similarity: Tensor, context: Context, is_positive: bool) -> Tensor:
    """Derivative dL/dS, (n,), of a pair at each similarity."""
    if not isinstance(loss, PairWeightingLoss):
        return _measured_probe(loss, similarity, context, is_positive)
    weighting = loss.weighting
    if isinstance(weighting, DirectWeighting):
        # The other side may need what a curve has not got, and has no part in this one.
        side = weighting.positive if is_positive else weighting.negative
        if isinstance(side, MeasuredWeights):
            weights = _measured_probe(side.loss, similarity, context, is_positive)
            nothing = Constant(1.0)
            share = _own_probe(loss, DirectWeighting(nothing, nothing), similarity, context, is_positive).abs()
            return weights * share
        weighting = DirectWeighting(side, Constant(0.0)) if is_positive else DirectWeighting(Constant(0.0), side)
    return _own_probe(loss, weighting, similarity, context, is_positive)


@torch.no_grad()
def _own_probe(
    loss: PairWeightingLoss, weighting: Weighting, similarity: Tensor, context: Context, is_positive: bool
) -> Tensor:
    """The weights of the first pair of each row, by the weighting, over what the loss's miner keeps."""
    parts = [weighting, *(side.weighting for side in weighting.modules() if isinstance(side, LossWeights))]
    if any(type(part).row_statistics is not Weighting.row_statistics for part in parts):
        raise InputError(
            f"{type(loss).__name__} couples the rows of anchors and positives and works in-batch only, so that an "
            "anchor's pairs alone have no weights: look at observed_weights of a batch, or choose another variant"
        )
    device = next((parameter.device for parameter in loss.parameters()), similarity.device)
    repeats = DRAWS if draws_pairs(loss) else 1
    rows = _rows(similarity.repeat_interleave(repeats), context).to(device)
    positive = torch.zeros(rows.shape, dtype=torch.bool, device=device)
    positive[:, 0] = is_positive
    positive[:, 1 : 1 + len(context.positives)] = True
    negative = ~positive
    with drawing_again(loss):  # looking must not change what training draws
        if loss.miner is not None:
            positive, negative = loss.miner(rows, positive, negative)
        _, weights = weighting(rows, positive, negative)
    mean: Tensor = weights[:, 0].reshape(-1, repeats).mean(dim=1).to(similarity.device)
    return mean


def _measured_probe(loss: nn.Module, similarity: Tensor, context: Context, is_positive: bool) -> Tensor:
    if bool((similarity.abs() > 1).any()):
        raise InputError(
            f"similarity must lie in [-1, 1] for {type(loss).__name__}, which is measured on unit vectors; got "
            f"{float(similarity[similarity.abs().argmax()]):g}"
        )
    for anchors in (1, 2):  # pytorch-metric-learning has no loss for a single anchor, or a single pair
        weights = _measured_rows(loss, similarity, context, is_positive, anchors)
        if bool(weights.any()):
            break
    return weights


def _measured_rows(loss: nn.Module, similarity: Tensor, context: Context, is_positive: bool, anchors: int) -> Tensor:
    rows = _rows(similarity, context)
    others = range(2, 2 + len(context.negatives))  # negatives of different classes, as they mostly are
    ref_labels = torch.tensor([0 if is_positive else 1, *(0 for _ in context.positives), *others])
    embeddings = torch.eye(1, 1 + rows.shape[1], dtype=torch.float64).expand(anchors, -1)
    weights = similarity.new_zeros(len(similarity))
    for place, row in enumerate(rows.cpu()):
        # Each reference leaves the anchor's axis along one of its own, so that any similarities fit together.
        references = torch.cat((row[:, None], torch.diag((1 - row.square()).clamp(min=0).sqrt())), dim=1)
        row_weights = measured_weights(loss, embeddings, embeddings.new_zeros(anchors).long(), references, ref_labels)
        weights[place] = row_weights[:, 0].sum()
    return weights


def _rows(similarity: Tensor, context: Context) -> Tensor:
    """Rows (n, 1 + P + K) of the pair in question, the other positives, the other negatives."""
    others = similarity.new_tensor([*context.positives, *context.negatives])
    return torch.cat((similarity[:, None], others.expand(len(similarity), -1)), dim=1)


def _in_words(values: Sequence[float], name: str) -> str:
    if not values:
        return f"no {name}s"
    low, high = min(values), max(values)
    span = f"at {low:g}" if math.isclose(low, high) else f"from {low:g} to {high:g}"
    return f"{len(values)} {name}{'s' if len(values) > 1 else ''} {span}"
