"""Which samples make a batch: P classes x K images, planned for all ranks at once, and evaluation without padding."""
