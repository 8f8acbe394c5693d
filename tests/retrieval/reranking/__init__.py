"""Tests of lightning_dml/retrieval/reranking."""
