"""Steps that change a ranking after the search: expansion and k-reciprocal re-ranking."""
