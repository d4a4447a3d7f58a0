"""How much of one image is read and decoded at most: what is beyond is refused before memory is taken for it."""

from __future__ import annotations

from typing import Any, NamedTuple

from vit_jax.data.errors import BadImage

MIN_SIDE = 2  # pixels: a tracking pixel is no picture
_MODEST = 1 << 24  # pixels that are decoded however few bytes they come from
_EMPTY = 10_000  # pixels a byte of what shows nothing at all: blank pages of a fax have fewer
_PIXEL_BYTES = 8  # for which the bound on pixels is meant: four values of 16 bits


class Limits(NamedTuple):
  """The bounds, which a source has as its attribute `limits`; the defaults are the config's."""

  max_pixels: int = 178_956_970  # height x width: Pillow's own bound; for a moment they take up to 20 bytes each
  max_file_bytes: int = 1 << 29  # of an encoded image

  def check_bytes(self, nbytes: int, name: str) -> None:
    """Raises BadImage for an encoded image of too many bytes."""
    if nbytes > self.max_file_bytes:
      raise BadImage(
        name, f"has {nbytes:,} bytes: more than data.max_file_bytes={self.max_file_bytes:,} are refused"
      )

  def check_size(self, width: int, height: int, name: str, *, pixel_bytes: int = 1, nbytes: int | None = None) -> None:
    """Raises BadImage for an image of too many pixels, or of too few to be one.

    Args:
      width, height: in pixels.
      name: what to call it.
      pixel_bytes: that the values of each pixel have; with more than eight, so many fewer pixels are allowed.
      nbytes: of the encoded image, if it is one: a file of a few bytes that wants gigabytes is a trap.
    """
    if min(width, height) < MIN_SIDE:
      raise BadImage(name, f"is {width} x {height} pixels: at least {MIN_SIDE} on each side are needed")
    pixels, most = width * height, self.max_pixels * _PIXEL_BYTES // max(_PIXEL_BYTES, pixel_bytes)
    if pixels > most:
      of = f" of {pixel_bytes} bytes each" if pixel_bytes > _PIXEL_BYTES else ""
      raise BadImage(
        name,
        f"is {width} x {height} pixels{of}: more than {most:,} are refused (data.max_pixels={self.max_pixels:,})",
      )
    if nbytes is not None and pixels > max(_MODEST, _EMPTY * nbytes):
      raise BadImage(name, f"is {width} x {height} pixels in {nbytes:,} bytes: no picture is so empty")


DEFAULT = Limits()


def limits_of(source: Any) -> Limits:
  """The bounds of a source's images."""
  return getattr(source, "limits", DEFAULT)
