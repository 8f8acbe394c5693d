"""Tests of lightning_dml/study/plan."""
