"""What the hub refuses."""

from __future__ import annotations


class UnknownModel(ValueError):
  """A path that holds no model that can be opened, or a place where none can be saved."""
