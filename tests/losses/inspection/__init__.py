"""Tests of lightning_dml/losses/inspection."""
