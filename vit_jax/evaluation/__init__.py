"""Frozen features and the protocols that score them."""
