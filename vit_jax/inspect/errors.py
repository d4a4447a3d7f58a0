"""Errors of this room that are for users."""

from __future__ import annotations


class PlanError(ValueError):
  """A plan cannot be made: unknown hardware, a compiler that is not installed, a compilation that fails."""


class ProfileError(ValueError):
  """A trace that cannot be read back."""
