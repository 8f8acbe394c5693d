"""Tests of the callbacks in trainings."""
