"""Tests of lightning_dml/retrieval/index."""
