"""Schedules of the bank, its options together, and settings that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dml import MetricLearningModule
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.errors import InputError
from lightning_dml.losses import ContrastiveLoss
from tests.callbacks.bank_cases import Foreign, fit
from tests.tiny import TinyEmbedder, bank_of, tiny_module


def test_the_weight_warms_up() -> None:
    """A young bank is stale and sparse; its loss may come in slowly."""
    callback = MemoryBankCallback(size=100, encoder="net", start_step=1, weight=2.0, warmup_steps=4)
    module = fit(callback, steps=8)
    weights = [weight for _, _, state, weight in module.records if state is not None]
    assert weights == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_the_weight_scales_the_loss_of_our_module() -> None:
    """A weight that is set and not used would be a setting that does nothing."""

    class Watched(MetricLearningModule):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            outputs = super().training_step(batch, batch_idx)
            losses.append(float(outputs["loss"].detach()))
            return outputs

    logged: dict[float, float] = {}
    for weight in (0.0, 1.0, 3.0):
        losses: list[float] = []
        module = Watched(TinyEmbedder(), ContrastiveLoss(0.3))
        fit(MemoryBankCallback(size=100, weight=weight), module, steps=1)
        logged[weight] = losses[0]
    assert logged[1.0] > logged[0.0]
    assert logged[3.0] - logged[0.0] == pytest.approx(3 * (logged[1.0] - logged[0.0]), rel=1e-5)


def test_the_momentum_rises_to_its_end() -> None:
    """BYOL's cosine, at its ends and in the middle."""
    momenta: list[float] = []

    class Noting(MemoryBankCallback):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            assert self.momentum_encoder is not None
            momenta.append(self.momentum_encoder.momentum)

    fit(Noting(size=20, encoder="net", momentum=0.6, momentum_end=1.0), steps=10)
    assert momenta[4] == pytest.approx(0.8)  # after step 5 of 10
    assert momenta[-1] == pytest.approx(1.0)
    assert momenta == sorted(momenta)


class Cropping(Foreign):
    """Embeds two crops at once: two rows for each label."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Calls the encoder with other rows than the batch has."""
        self.net(torch.cat((batch["image"], batch["image"])))
        return super().training_step(batch, batch_idx)


class Idle(Foreign):
    """Never calls the submodule that is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = TinyEmbedder()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MemoryBankCallback(warmup_steps=-1), "warmup_steps.*-1"),
        (lambda: MemoryBankCallback(weight=-1.0), "weight.*-1"),
        (lambda: MemoryBankCallback(enqueue="late"), "enqueue must be one of before, after, got 'late'"),  # type: ignore[arg-type]
        (lambda: MemoryBankCallback(policy="stack"), "policy.*'stack'"),  # type: ignore[arg-type]
        (lambda: MemoryBankCallback(adaptation="mean"), "adaptation.*'mean'"),  # type: ignore[arg-type]
        (lambda: MemoryBankCallback(average=0.5), "average 0.5 needs policy 'samples'"),
        (lambda: MemoryBankCallback(size=1.0, policy="samples", average=1.0), "average.*1.0"),
        (lambda: MemoryBankCallback(size=0.5, policy="samples"), "size to 1.0, got 0.5"),
        (lambda: MemoryBankCallback(momentum_end=0.5), "momentum_end.*0.5 with momentum=0.99"),
        (lambda: MemoryBankCallback(momentum=None, momentum_end=0.5), "momentum_end.*momentum=None"),
        (lambda: fit(MemoryBankCallback(momentum=None, encoder="net"), Cropping()), r"\(8, D\).*\(16, 6\)"),
        (lambda: fit(MemoryBankCallback(momentum=None, encoder="idle"), Idle()), "did not call Idle.idle"),
        (lambda: fit(MemoryBankCallback(encoder="net", bank_file="none.pt")), "none.pt"),
        (
            lambda: fit(
                MemoryBankCallback(encoder="net", momentum_end=1.0), steps=-1, max_epochs=-1, max_time="00:00:00:01"
            ),
            "momentum_end needs to know the last step",
        ),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], words: str) -> None:
    """Settings that exclude each other, or a module that does not fit them, must not train something else silently."""
    with pytest.raises(InputError, match=words):
        call()


def test_our_module_trains_with_everything_on() -> None:
    """The options are used together, too."""
    callback = MemoryBankCallback(
        size=1.0, policy="samples", average=0.5, adaptation="kalman", initial_fill=True, start_step=1, warmup_steps=2
    )
    module = fit(callback, tiny_module(), steps=6)
    assert int(bank_of(module).store.labelled) == 60
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
