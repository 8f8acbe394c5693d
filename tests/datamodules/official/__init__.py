"""Tests of datamodules/official."""
