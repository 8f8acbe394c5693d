"""The one line that the command line shows for an error that the caller can put right."""

from __future__ import annotations

import sys

from lightning_dml.errors import input_error_in


def message_of(error: BaseException) -> str | None:
    """One line for what the caller can put right, None for anything else."""
    if isinstance(error, ModuleNotFoundError) and "tensorboard" in str(error):
        return (
            "TensorBoardLogger needs the package tensorboard: pip install 'lightning-dml[report]', "
            "or take the logger out of the config"
        )
    if isinstance(error, FileNotFoundError) or is_lightnings(error):
        return " ".join(str(error).split())
    ours = input_error_in(error)
    return None if ours is None else str(ours)


def is_lightnings(error: BaseException) -> bool:
    """True for Lightning's MisconfigurationException."""
    # Looked up and not imported: an error of Lightning's comes only after it was loaded, which takes seconds.
    exceptions = sys.modules.get("lightning_fabric.utilities.exceptions")
    return exceptions is not None and isinstance(error, exceptions.MisconfigurationException)
