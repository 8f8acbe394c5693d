"""A watch on a submodule, which hands over its output in the middle of a training step, before the loss is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class EncoderWatch:
    """Hands the first output of a module after each `arm` to a receiver, detached.

    Only the first call counts: a later call in the same step, such as an evaluation or the repeated forward pass of
    activation checkpointing, does not belong to the batch. It works inside compiled modules too, where the hook runs
    outside the graph.

    Args:
        module: the module to watch, until `remove`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._receive: Callable[[Any], None] | None = None
        self._handle = module.register_forward_hook(_Hook(self))

    @property
    def armed(self) -> bool:
        """True while it waits for an output."""
        return self._receive is not None

    def arm(self, receive: Callable[[Any], None]) -> None:
        """Waits for the next output and gives it to `receive`."""
        self._receive = receive

    def disarm(self) -> None:
        """Waits no longer."""
        self._receive = None

    def remove(self) -> None:
        """Takes the watch off the module."""
        self.disarm()
        self._handle.remove()

    def _output(self, output: Any) -> None:
        receive, self._receive = self._receive, None
        if receive is not None:
            receive(output.detach() if isinstance(output, Tensor) else output)


class _Hook:
    """The forward hook; in a copy of the module, such as a momentum encoder, it does nothing."""

    def __init__(self, watch: EncoderWatch | None) -> None:
        self._watch = watch

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._watch is not None:
            self._watch._output(output)
