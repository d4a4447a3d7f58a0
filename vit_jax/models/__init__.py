"""Linen modules and their sizes."""
