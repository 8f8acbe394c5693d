"""Tests of the callbacks: what a training run sees of the memory and of the report."""
