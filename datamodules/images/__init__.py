"""Images: opened, checked, cached, transformed, and as data sets."""
