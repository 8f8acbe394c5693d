"""The plan of a study: its file, its grid, and the overrides of each point."""
