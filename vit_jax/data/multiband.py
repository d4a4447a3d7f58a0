"""Values of more than 8 bits as they are in the file: of several bands, Pillow would keep only their high bytes."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from vit_jax.data import formats, headers, tiff
from vit_jax.data.errors import BadImage
from vit_jax.data.formats import Format


class Values(NamedTuple):
  """The values of an image, and how many bits its file says that they have (None: those of their type)."""

  array: np.ndarray  # [H, W], [H, W, C] or [C, H, W]
  bits: int | None = None


def several_bands(data: bytes, name: str, format: Format, image: Image.Image) -> Values | None:
  """The values of an image (no TIFF) of several bands of 16 bits, or in the units of the file; else None.

  Raises:
    BadImage: if nothing here reads them whole.
  """
  if format is formats.PNG:
    bands, bits = headers.png_bands(data)
    return Values(_png(data, name)) if bits == 16 and bands > 1 else None
  if format is formats.PNM and (header := headers.pnm(data)) is not None and header.greatest > 255:
    shape = (header.height, header.width, header.bands)
    count = header.height * header.width * header.bands
    if 2 * count > len(data) - header.start:
      rest = len(data) - header.start
      raise BadImage(name, f"cannot be decoded: its header claims {2 * count:,} bytes, of which {rest:,} are there")
    values = np.frombuffer(data, ">u2", count, header.start).reshape(shape)
    return Values(values, header.greatest.bit_length())
  if format is formats.JPEG2000:
    header = headers.jpeg2000(data)
    if header.bits <= 8:
      return None
    if header.bands > 1:
      raise BadImage(
        name, f"is a JPEG 2000 file of {header.bands} bands of {header.bits} bits, of which only 8 can be read: "
        "convert it to TIFF or PNG"
      )  # fmt: skip
    return Values(np.asarray(image) >> (16 - header.bits), header.bits)  # Pillow has filled 16 bits
  return None


def one_band(image: Image.Image, header: tiff.Header | None) -> Values:
  """The values of an opened image of one band, in their own type; `header`: of a TIFF file."""
  array = np.asarray(image)
  if header is None:  # "I": the 16 bits of a PNG or PGM in 32
    array = array.astype(np.uint16) if image.mode == "I" else array
    transparent = image.info.get("transparency")  # a value of a PNG
    if isinstance(transparent, int) and array.dtype == np.uint16:
      return Values(np.stack([array, np.where(array == transparent, 0, 65535).astype(np.uint16)], axis=2))
    return Values(array)
  if image.mode == "I" and header.dtype is not None:
    array = array.astype(header.dtype)  # Pillow has widened 16 bits with a sign, or seen a sign in 32 without
  return Values(array, header.fewer_bits)


def _png(data: bytes, name: str) -> np.ndarray:
  if not headers.png_is_whole(data):
    raise BadImage(name, "cannot be decoded: the PNG file is cut off or damaged")
  samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
  if samples is None:
    raise ValueError("a damaged PNG")
  return cv2.cvtColor(samples, cv2.COLOR_BGR2RGB if samples.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
