"""Image files: opening, checks, a cache, transforms, and data sets of them."""
