"""Tests of the memory: the ring buffer and the momentum encoder against their definitions."""
