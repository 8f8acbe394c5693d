"""The official files of the public data sets, read and checked."""
