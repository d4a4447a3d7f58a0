"""What makes an image unusable, each kind with the image's name and the reason in words."""

from __future__ import annotations

_LONGEST = 240  # characters of what a decoder says: some quote the file


class BadImage(Exception):
  """An image that cannot be used: `name` says which, `reason` why."""

  def __init__(self, name: str, reason: str):
    super().__init__(name, reason)  # both: what travels between processes
    self.name = name
    self.reason = reason

  def __str__(self) -> str:
    return f"{self.name}: {self.reason}"


class OtherChannels(BadImage):
  """An image that has not the channels that all images should have; `fewest`: those that it may have itself."""

  def __init__(self, name: str, reason: str, fewest: int | None = None):
    super().__init__(name, reason)
    self.fewest = fewest


class UnknownRange(BadImage):
  """An image whose values can be scaled to 8 bits only by a range that nobody has given (`data.value_range`)."""


class NeedsPackage(BadImage):
  """An image of a format that is read by a package that is not installed."""


def in_words(error: BaseException) -> str:
  """What a decoder's exception says, in one printable line: it may quote bytes of the file."""
  text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
  text = text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
