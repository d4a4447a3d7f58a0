"""Small pure array functions."""
