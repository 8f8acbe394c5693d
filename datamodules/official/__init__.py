"""Public data sets in their official files, which are read and checked."""
