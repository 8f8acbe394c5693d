"""What came out of a study: statistics, tables and figures."""
