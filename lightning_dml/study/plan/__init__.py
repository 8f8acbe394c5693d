"""What a study is to run: its file, its grid, and the overrides of each point."""
