"""Opens an encoded image with the one decoder that its content asks for, after the bounds on it have been checked.

The only place where Pillow opens what comes from outside.
"""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError, features

from vit_jax.data import formats, headers
from vit_jax.data.errors import BadImage, NeedsPackage, in_words
from vit_jax.data.formats import Format
from vit_jax.data.limits import Limits

_SCANNED = 4_000_000_000  # pixels times scans of a JPEG: some seconds

def known_format(data: bytes, name: str) -> Format:
  """The format of an encoded image, by its content.

  Raises:
    BadImage: if it is of none that is read; says what it is.
  """
  if not data:
    raise BadImage(name, "the file is empty")
  format = formats.format_of(data[: formats.START])
  if format is None:
    raise BadImage(name, f"is {formats.stranger(data[: formats.START])}")
  return format


def open_image(data: bytes, name: str, format: Format, limits: Limits) -> Image.Image:
  """The image, opened but not decoded.

  Args:
    data: the encoded image.
    name: what to call it in an error.
    format: which it is (`known_format`).
    limits: on its size.

  Raises:
    BadImage: if it is damaged, or beyond the limits.
    NeedsPackage: if what decodes this format is not installed.
    Exception: almost any, for a damaged file.
  """
  _check_claims(data, name, format, limits)
  if format is formats.HEIC:
    _register_heic(name)
  if format is formats.AVIF and not features.check("avif"):
    raise NeedsPackage(name, "is an AVIF image, which this Pillow cannot read: pip install 'pillow>=11.3'")
  if Image.MAX_IMAGE_PIXELS is not None and limits.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
    Image.MAX_IMAGE_PIXELS = limits.max_pixels  # more are asked for than Pillow allows, which is twice its bound
  try:
    image = Image.open(io.BytesIO(data), formats=(format.decoder,))
  except UnidentifiedImageError as error:
    raise BadImage(name, f"is a damaged {format.name} file, or one of a kind that is not read") from error
  except Image.DecompressionBombError as error:
    reason = f"has more pixels than data.max_pixels={limits.max_pixels:,} ({in_words(error)})"
    raise BadImage(name, reason) from error
  limits.check_size(image.width, image.height, name, nbytes=len(data))
  if format is formats.JPEG:
    most = _SCANNED // (image.width * image.height)
    if len(data) > most * headers.JPEG_SCAN and (scans := headers.jpeg_scans(data)) > most:
      raise BadImage(name, f"is a JPEG of {scans:,} scans, which take too long to decode")
  return image


def _check_claims(data: bytes, name: str, format: Format, limits: Limits) -> None:
  """Checks what decoders take memory or time for before they tell the size, or without telling."""
  if format is formats.WEBP and (size := headers.webp_size(data)) is not None:
    limits.check_size(*size, name, nbytes=len(data))
  if format is formats.PNG and not headers.png_fits(data):
    raise BadImage(name, "is a PNG file that is cut off: it cannot hold the pixels that it claims")
  if format is formats.JPEG2000:
    limits.check_size(*headers.jpeg2000(data).tile, name)


def _register_heic(name: str) -> None:
  try:
    import pillow_heif
  except ImportError as error:
    reason = 'is a HEIC image, which needs the package pillow-heif: pip install "vit-jax[heic]"'
    raise NeedsPackage(name, reason) from error
  if formats.HEIC.decoder not in Image.OPEN:
    pillow_heif.register_heif_opener()
