"""Tests of lightning_dml/study/results."""
