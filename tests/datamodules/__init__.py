"""Tests of the data modules: what reaches the model, in which order, and what a wrong folder or option says."""
