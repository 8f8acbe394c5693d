"""Tests of datamodules/images."""
