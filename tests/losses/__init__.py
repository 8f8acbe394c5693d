"""Tests of the losses: values and gradients against slow textbook code, on one process and on several."""
