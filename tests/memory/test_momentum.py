"""The momentum encoder against the formula, and the statistics of its batch norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_dml.errors import InputError
from lightning_dml.memory import MomentumEncoder


def net() -> nn.Sequential:
    """A network with a batch norm, the layer that makes momentum encoders hard."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def shift(module: nn.Module, by: float) -> None:
    """Stands in for an optimizer step."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def test_parameters_follow_the_formula() -> None:
    """A swapped m and 1 - m would still train, at a momentum that nobody asked for."""
    online = net()
    encoder = MomentumEncoder(online, 0.9)
    expected = [parameter.detach().clone() for parameter in online.parameters()]
    for step in range(5):
        shift(online, 0.1 * step)
        encoder.update(online)
        expected = [0.9 * old + 0.1 * new for old, new in zip(expected, online.parameters(), strict=True)]
    for own, right in zip(encoder.encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(own, right.detach())
        assert not own.requires_grad


@pytest.mark.parametrize(("momentum", "moves_to"), [(0.0, "online"), (1.0, "start")])
def test_the_ends_of_the_range(momentum: float, moves_to: str) -> None:
    """0 is a plain copy and 1 a frozen one; both are used as baselines."""
    online = net()
    start = [parameter.detach().clone() for parameter in online.parameters()]
    encoder = MomentumEncoder(online, momentum)
    shift(online, 1.0)
    encoder.update(online)
    target = list(online.parameters()) if moves_to == "online" else start
    for own, right in zip(encoder.encoder.parameters(), target, strict=True):
        torch.testing.assert_close(own, right.detach())


def test_batch_norm_statistics_evolve_by_the_own_forward_only() -> None:
    """Statistics of the online network do not fit the weights of this one."""
    online = net()
    encoder = MomentumEncoder(online, 0.5)
    online(torch.randn(8, 3))
    encoder.update(online)
    assert torch.equal(encoder.encoder.get_buffer("1.running_mean"), torch.zeros(4))
    encoder.match_mode(online)
    encoder(torch.randn(8, 3))
    assert not torch.equal(encoder.encoder.get_buffer("1.running_mean"), torch.zeros(4))


def test_layers_that_are_frozen_online_are_frozen_here() -> None:
    """Batch norm that a user froze must not move in the keys."""
    online = net()
    online[1].eval()
    encoder = MomentumEncoder(online, 0.5)
    encoder.train()
    encoder.match_mode(online)
    encoder(torch.randn(8, 3))
    assert encoder.encoder.get_submodule("0").training and not encoder.encoder.get_submodule("1").training
    assert torch.equal(encoder.encoder.get_buffer("1.running_mean"), torch.zeros(4))


def test_wrong_input_is_named() -> None:
    """A momentum above 1 diverges, and a changed network cannot be followed."""
    with pytest.raises(InputError, match=r"momentum.*1.5"):
        MomentumEncoder(net(), 1.5)
    with pytest.raises(InputError, match="changed in number"):
        MomentumEncoder(net()).update(nn.Linear(3, 4))
