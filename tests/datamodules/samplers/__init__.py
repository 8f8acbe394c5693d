"""Tests of datamodules/samplers."""
