"""Errors whose message is written for the user: the command prints them as they are, without a traceback."""

from __future__ import annotations


class UserError(Exception):
  """Something the user can put right; the message says what was wrong, the value, and what would be right."""


class ConfigError(UserError, ValueError):
  """A wrong configuration: unknown key, wrong type, impossible value or combination. One line a problem."""


class DamagedConfig(ConfigError):
  """The file of a saved config is damaged: what was in it is lost, whatever it was."""
