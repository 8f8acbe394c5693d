"""Mining by chance: semi-hard and distance-weighted draws that repeat, and that resume from a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dml import distributed
from lightning_dml.checks import check_count, check_number
from lightning_dml.losses.measure import Measure, check_measure
from lightning_dml.losses.mining.base import Miner, at_columns, highest

# The logarithm of a share that no draw meets. Beyond the range of exp, on either side, a CPU takes fifty times as long.
_NEVER = -80.0


class SampledMiner(Miner):
    """A miner that draws among the pairs, from a seeded stream.

    Every row uses the same count of random numbers, in the order of the rows, from one stream. So the draws do not
    depend on the engine's block size; and the state is a single integer, the position in the stream, which is saved
    with the module's `state_dict` (the seed is a setting, and is not). Each rank mines its own anchors and has a
    stream of its own, made of the seed and the rank; ranks with equally many anchors stand at the same position, so
    that rank 0's checkpoint resumes them all exactly. The stream is made on the CPU and is the same whatever device
    the similarities are on.

    Args:
        seed: start of the stream, or a `torch.Generator` to draw that from. Two miners of one model should not share
            a seed.

    Raises:
        InputError: for a negative seed.
    """

    def __init__(self, seed: int | torch.Generator = 0) -> None:
        super().__init__()
        if isinstance(seed, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
        check_count("seed", seed, least=0)
        self.seed = seed
        self._position = 0

    def draw(self, per_row: int, similarity: Tensor) -> Tensor:
        """The next random numbers in [0, 1], (n, per_row) for the n rows of `similarity`, of its dtype and device."""
        shape = (len(similarity), per_row)
        stream = np.random.PCG64(np.random.SeedSequence([self.seed, distributed.rank()])).advance(self._position)
        self._position += math.prod(shape)  # one step of the stream each
        return torch.from_numpy(np.random.Generator(stream).random(shape)).to(similarity.dtype).to(similarity.device)

    def get_extra_state(self) -> Tensor:
        """Position in the stream, for `state_dict`: 0-dim int64."""
        return torch.tensor(self._position)

    def set_extra_state(self, state: Any) -> None:
        """Continues at a saved position; called by `load_state_dict`."""
        self._position = int(state)


class SemiHardMiner(SampledMiner):
    r"""Semi-hard mining in the manner of FaceNet: one positive and one negative of each anchor.

    The positive p is drawn evenly. The negative is drawn evenly from those that are farther than the positive, but by
    less than the margin: :math:`d_{ap} < d_{an} < d_{ap} + m`; where there is none, from all negatives. An anchor
    without positives or without negatives keeps nothing.

    Args:
        margin: m, in the units of the measure.
        measure: what is compared: `similarity`, where the rule reads :math:`S_{ap} - m < S_{an} < S_{ap}`; `distance`
            :math:`d = \sqrt{2 - 2S}`; `squared_distance` :math:`d^2`. FaceNet has the squared distance: set
            `squared_distance` for its rule, and `distance` for the rule as written above.
        seed: see `SampledMiner`.

    Raises:
        InputError: for a margin that is not positive, an unknown measure or a negative seed.
    """

    def __init__(
        self, margin: float = 0.2, *, measure: Measure = "similarity", seed: int | torch.Generator = 0
    ) -> None:
        super().__init__(seed)
        check_number("margin", margin, "a number in the units of the measure, such as 0.2", above=0)
        check_measure(measure)
        self.margin = margin
        self.measure = measure

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        chance = self.draw(2, similarity)
        if similarity.shape[1] == 0:
            return positive, negative
        chosen = _evenly(positive, chance[:, :1])
        # Rounding may leave a similarity above 1, which is no distance.
        nearest = similarity.gather(1, chosen).clamp_(max=1)
        band = negative & (similarity < nearest) & (similarity > self._farthest(nearest))
        candidates = torch.where(band.any(dim=1, keepdim=True), band, negative)
        kept_positive = at_columns(chosen, positive)
        kept_negative = at_columns(_evenly(candidates, chance[:, 1:]), candidates)
        both = positive.any(dim=1, keepdim=True) & negative.any(dim=1, keepdim=True)
        return kept_positive & both, kept_negative & both

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"margin={self.margin}, measure={self.measure!r}, seed={self.seed}"

    def _farthest(self, nearest: Tensor) -> Tensor:
        """Similarity at which a negative is farther than the positive by the margin."""
        if self.measure == "similarity":
            return nearest - self.margin
        if self.measure == "squared_distance":
            return nearest - self.margin / 2
        return 1 - ((2 - 2 * nearest).sqrt() + self.margin) ** 2 / 2


class DistanceWeightedMiner(SampledMiner):
    r"""Distance-weighted sampling of negatives; keeps all positives.

    On the unit sphere in n dimensions most points are about :math:`\sqrt 2` apart, so an even draw finds nothing but
    easy negatives. Here a negative at distance d is drawn in proportion to the inverse of the density of distances,

    .. math::
        \log q^{-1}(d) = (2 - n) \log d - \frac{n - 3}{2} \log\Big(1 - \frac{d^2}{4}\Big)

    with d raised to `min_distance`, and with probability 0 from `max_distance` on.

    An anchor draws as many negatives as it has positives, or a fixed number. The K draws of an anchor are made with
    one random number, at K evenly spaced points of the cumulative distribution (systematic sampling, this library's
    choice): a negative of probability p is kept with probability exactly :math:`\min(1, Kp)`, where independent draws
    would meet the same one again and keep fewer. An anchor with no negative within `max_distance` keeps none, and
    its positives still (also ours).

    Args:
        dim: number of dimensions n of the embeddings.
        min_distance: distance below which the density is taken as constant.
        max_distance: distance from which on a negative is never drawn; 1.4 in pytorch-metric-learning. None sets no
            limit: then also the farthest are favoured, as the density falls towards d = 2; its last factor is kept
            from 0 there.
        negatives: how many an anchor draws; None draws as many as it has positives.
        seed: see `SampledMiner`.

    Raises:
        InputError: for fewer than 2 dimensions, distances that are not in order within (0, 2], a number of negatives
            below 1 or a negative seed.
    """

    def __init__(
        self,
        dim: int,
        min_distance: float = 0.5,
        max_distance: float | None = 1.4,
        *,
        negatives: int | None = None,
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__(seed)
        check_count("dim", dim, least=2, hint="it is the number of dimensions of the embeddings")
        meaning = "a distance between unit vectors such as"
        check_number("min_distance", min_distance, f"{meaning} 0.5", above=0, below=2)
        if max_distance is not None:
            hint = f"min_distance is {min_distance}, and None sets no limit"
            check_number("max_distance", max_distance, f"{meaning} 1.4", above=min_distance, most=2, hint=hint)
        if negatives is not None:
            check_count("negatives", negatives, hint="None draws as many as there are positives")
        self.dim = dim
        self.min_distance = min_distance
        self.max_distance = max_distance
        self.negatives = negatives

    def forward(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Mines a block of rows; see `Miner.forward`."""
        chance = self.draw(1, similarity)
        if similarity.numel() == 0:
            return positive, negative
        if self.max_distance is not None:
            negative = negative & (similarity > 1 - self.max_distance**2 / 2)
        weights = self._log_weights(similarity)
        weights.sub_(highest(weights, negative)).clamp_(_NEVER, 0).exp_().masked_fill_(~negative, 0)
        cumulative = weights.cumsum_(dim=1)
        total = cumulative[:, -1:]

        counts = self._counts(positive)
        most = int(counts.max()) if self.negatives is None else self.negatives
        # A row that draws fewer repeats its last point.
        slots = torch.minimum(torch.arange(most, device=counts.device), (counts - 1).clamp_(min=0))
        below_total = torch.nextafter(total, torch.zeros_like(total))  # rounding must not take a point past the end
        points = torch.minimum((chance + slots) / counts.clamp(min=1) * total, below_total)
        columns = torch.searchsorted(cumulative, points, right=True).clamp_(max=similarity.shape[1] - 1)
        return positive, at_columns(columns, negative & (counts > 0))

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return (
            f"dim={self.dim}, min_distance={self.min_distance}, max_distance={self.max_distance}, "
            f"negatives={self.negatives}, seed={self.seed}"
        )

    def _log_weights(self, similarity: Tensor) -> Tensor:
        """Logarithm of q^-1 for each pair, (n, M), with d^2 = 2 - 2 S and 1 - d^2 / 4 = (1 + S) / 2."""
        squared = similarity.mul(-2).add_(2).clamp_(min=self.min_distance**2)
        rest = squared.mul(-0.25).add_(1).clamp_(min=torch.finfo(torch.float32).eps).log_()
        return squared.log_().mul_((2 - self.dim) / 2).add_(rest, alpha=(3 - self.dim) / 2)

    def _counts(self, positive: Tensor) -> Tensor:
        """Number of negatives that each row draws, (n, 1) int64."""
        if self.negatives is not None:
            return torch.full((len(positive), 1), self.negatives, device=positive.device)
        # Positives are few: listing them is cheaper than a sum over the block.
        return torch.bincount(positive.nonzero()[:, 0], minlength=len(positive))[:, None]


def _evenly(mask: Tensor, chance: Tensor) -> Tensor:
    """A column of the mask (n, M) in each row, drawn evenly by `chance` (n, 1); any column where it is empty."""
    running = mask.cumsum(dim=1, dtype=torch.int32)
    count = running[:, -1:]
    place = torch.minimum((chance * count).to(torch.int32), (count - 1).clamp_(min=0))
    return torch.searchsorted(running, place, right=True).clamp_(max=mask.shape[1] - 1)
