"""Tables of images: reading, checks, and splits by class."""
