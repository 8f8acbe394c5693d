"""The commands of `lightning-dml` beyond Lightning's own, one file for each."""
