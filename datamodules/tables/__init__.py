"""Tables of images: read from files, checked, and split."""
