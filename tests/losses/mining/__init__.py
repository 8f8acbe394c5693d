"""Tests of lightning_dml/losses/mining."""
