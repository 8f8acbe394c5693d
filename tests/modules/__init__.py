"""Tests of the modules: the embedder and the LightningModule that trains it."""
