"""The results of a study: statistics, tables and figures."""
