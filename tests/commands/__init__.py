"""Tests of lightning_dml/commands."""
