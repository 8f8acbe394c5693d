"""The weights of any loss: of given pairs, as curves, and of a real batch."""
