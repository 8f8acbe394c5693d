"""Tests of lightning_dml/study/running."""
