"""Labels that mean something other than a class."""

from __future__ import annotations

UNLABELLED = -1
"""Label of a row that takes part in no pair: a distractor, an empty slot of a bank, a row left out.

As a sample index or a step it means that the number is not known.
"""
