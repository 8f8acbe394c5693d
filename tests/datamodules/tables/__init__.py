"""Tests of datamodules/tables."""
