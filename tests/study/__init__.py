"""Tests of `lightning-dml study`."""
