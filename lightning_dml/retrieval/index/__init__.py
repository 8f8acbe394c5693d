"""Approximate indexes: built once, saved, and measured by what they miss."""
