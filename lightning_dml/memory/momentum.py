"""The momentum encoder: an exponential moving average of the embedder that makes the bank's keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dml.checks import check_number
from lightning_dml.errors import InputError, one_line


class MomentumEncoder(nn.Module):
    r"""A copy of an embedder whose parameters follow it slowly (MoCo, arXiv 1911.05722, section 3.2).

    .. math:: \theta_k \leftarrow m\, \theta_k + (1 - m)\, \theta_q

    Only parameters are averaged. Buffers, such as the running statistics of batch norm, evolve by the encoder's own
    forward passes, as in MoCo: call it in the mode of the embedder, with the batches that the embedder sees
    (`match_mode`). Layers that the embedder holds in evaluation mode stay as they were copied.

    An embedder that `torch.compile` wrapped gives an encoder that is compiled as well; its state has the names of the
    embedder that is not.

    Args:
        module: the embedder to copy; it is not kept.
        momentum: m in [0, 1]; 0 copies at each update, 1 never changes.

    Raises:
        InputError: if `momentum` lies outside [0, 1], or a parameter is in half precision, where steps of a hundredth
            round to nothing.

    Examples:
        >>> online = nn.Linear(2, 2)
        >>> encoder = MomentumEncoder(online, momentum=0.9)
        >>> encoder.update(online)
        >>> encoder(torch.ones(1, 2)).requires_grad
        False
    """

    def __init__(self, module: nn.Module, momentum: float = 0.99) -> None:
        super().__init__()
        check_momentum(momentum)
        check_precision(module)
        self.momentum = momentum
        self.encoder = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the parameters a step of 1 - momentum towards those of `module`.

        Raises:
            InputError: if `module` has other parameters than the copied one.
        """
        own, online = list(self.encoder.parameters()), list(module.parameters())
        if [p.shape for p in own] != [p.shape for p in online]:
            raise InputError(
                "the embedder's parameters changed in number or shape since the momentum encoder copied it; "
                "build all layers before training starts, in configure_model at the latest"
            )
        for parameter, target in zip(own, online, strict=True):
            parameter.lerp_(target.detach().to(parameter), 1 - self.momentum)

    def state_of_encoder(self) -> dict[str, Any]:
        """State of the copied embedder, under the names it has without `torch.compile`."""
        return uncompiled(self.encoder).state_dict()

    def load_state_of_encoder(self, state: Mapping[str, Any]) -> None:
        """Takes over a state that `state_of_encoder` gave.

        Raises:
            InputError: if the state is of another embedder.
        """
        try:
            uncompiled(self.encoder).load_state_dict(state)
        except RuntimeError as error:
            raise InputError(
                "the saved momentum encoder does not fit the embedder: "
                f"{one_line(error)}; resume with the embedder that the run was started with"
            ) from error

    def match_mode(self, module: nn.Module) -> None:
        """Puts each layer into the training or evaluation mode of its counterpart in `module`."""
        for own, online in zip(self.encoder.modules(), module.modules(), strict=True):
            own.training = online.training

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Keys of a batch: the output of the copied embedder, without gradient."""
        keys: Tensor = self.encoder(images)
        return keys


def check_momentum(momentum: float, hint: str = "") -> None:
    """Raises InputError unless `momentum` lies in [0, 1]."""
    check_number("momentum", momentum, "the share of the older weights, such as 0.99", least=0, most=1, hint=hint)


def check_precision(module: nn.Module) -> None:
    """Raises InputError if a parameter is in half precision, in which the encoder's steps would round to nothing."""
    for name, parameter in module.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise InputError(
                f"a momentum encoder needs float32 parameters, but {name} is {parameter.dtype}, in which its small "
                "steps round to nothing; train with precision 'bf16-mixed', or take online keys with momentum=None"
            )


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` returns, or the module itself."""
    # torch (2.14, observed) has no public way to it, and names the state's tensors after this attribute.
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner
