"""Starts the command line for `python -m lightning_dml`."""

from lightning_dml.cli import main

if __name__ == "__main__":
    main()
