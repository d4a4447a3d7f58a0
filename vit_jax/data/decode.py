"""Image files and arrays of any common kind -> one form: uint8 RGB [H, W, 3].

What is decided here, once for every source:
  * EXIF orientation is applied.
  * Transparent pixels are seen on white: what lies under them is arbitrary.
  * 16-bit and 32-bit integer samples keep their high byte, floating-point samples are in [0, 1].
  * Grey becomes three equal channels; palettes, CMYK, YCbCr and Lab become RGB; of an animation the first frame counts.
  * What cannot be decoded completely, or is unreasonably large or small, is a `BadImage` that names it.
"""

from __future__ import annotations

import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_jax.data import jpeg

MIN_SIDE = 2  # pixels: a tracking pixel is no picture
MAX_PIXELS = 178_956_970  # the size at which Pillow itself refuses (a "decompression bomb")
_ORIENTATION = 0x0112  # the EXIF tag
_NUMPY = b"\x93NUMPY"  # how a .npy file begins


class BadImage(Exception):
  """An image that cannot be used: `name` says which, `reason` why."""

  def __init__(self, name: str, reason: str):
    super().__init__(name, reason)  # both: what travels between processes
    self.name = name
    self.reason = reason

  def __str__(self) -> str:
    return f"{self.name}: {self.reason}"


def decode(
  data: bytes | os.PathLike | np.ndarray,
  name: str = "image",
  *,
  enough: int | None = None,
  fits: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
  """Decodes an encoded image (bytes or a file's path), or brings an array into the form of a decoded one.

  Args:
    data: the encoded image, a path to it, or an array [H, W], [H, W, 1], [H, W, 2] (grey, alpha), [H, W, 3] or
      [H, W, 4] of uint8, uint16, or floats in [0, 1].
    name: what to call it in an error.
    enough: a JPEG whose short side has at least twice as many pixels as this comes out at 1/2, 1/4 or 1/8 of its size,
      no smaller than this: decoding a photograph of 12 megapixels takes a fraction of the time so. None: full size.
    fits: (height, width) into which the image will have to fit: a JPEG that is at least twice as large comes out
      smaller too, but no smaller than what just fits.

  Raises:
    BadImage: if it is missing, empty, truncated, corrupt, of no known format, larger than `MAX_PIXELS` or has a side
      below `MIN_SIDE`.
  """
  if isinstance(data, np.ndarray):
    return _from_array(data, name)
  if isinstance(data, bytes) and not data:
    raise BadImage(name, "the file is empty")
  if isinstance(data, bytes) and data.startswith(_NUMPY):
    return _from_array(_saved_array(data, name), name)
  try:
    # The formats' decoders raise almost anything on damaged input (OSError, SyntaxError, struct.error, IndexError, …).
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
      _check_size(image.width, image.height, name)
      if image.format == "JPEG":
        shrunk = jpeg.shrinking(image.size, enough, fits)
        pixels = jpeg.decode_rgb(image, data, shrunk)
        if pixels is not None:
          return _turned(pixels, image)
        if shrunk > 1:
          image.draft(None, (image.width // shrunk, image.height // shrunk))
      return np.asarray(to_rgb(_upright(image)))  # [H, W, 3]
  except BadImage:
    raise
  except UnidentifiedImageError as error:
    raise BadImage(name, "is no image of a known format") from error
  except Exception as error:
    raise BadImage(name, f"cannot be decoded ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
  """Any Pillow mode -> RGB, by the rules at the top of this file."""
  if image.mode == "RGB":
    image.load()
    return image
  if image.mode == "F" or image.mode.startswith("I"):
    return Image.fromarray(_deep_to_uint8(np.asarray(image))).convert("RGB")
  if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
  """The image as its EXIF orientation wants it shown; a damaged EXIF block counts as none."""
  return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # the picture itself may be fine
    return 1


def _turned(pixels: UInt8[np.ndarray, "H W 3"], image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
  """The decoded pixels of a file as its EXIF orientation wants them shown."""
  orientation = _orientation(image) if "exif" in image.info else 1
  if not 2 <= orientation <= 8:
    return pixels
  if orientation >= 5:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (2, 3, 7, 8):  # left and right change places
    pixels = pixels[:, ::-1] if orientation in (2, 3) else pixels[::-1]
  if orientation in (3, 4, 6, 7):
    pixels = pixels[::-1] if orientation in (3, 4) else pixels[:, ::-1]
  return np.ascontiguousarray(pixels)


def _deep_to_uint8(samples: np.ndarray) -> UInt8[np.ndarray, " ..."]:
  """Samples of more than 8 bits -> uint8: the high byte of integers, 255 x of floats in [0, 1]."""
  if np.issubdtype(samples.dtype, np.floating):
    return (np.nan_to_num(np.clip(samples, 0.0, 1.0)) * 255.0 + 0.5).astype(np.uint8)
  # Pillow gives 16-bit files as 32-bit integers too: what fits in 16 bits is taken for 16-bit.
  wide = samples.dtype.itemsize > 2 and samples.size > 0 and int(samples.max()) >= 1 << 16
  return np.clip(samples >> (24 if wide else 8), 0, 255).astype(np.uint8)


def _saved_array(data: bytes, name: str) -> np.ndarray:
  """The array in a .npy file."""
  try:
    return np.load(io.BytesIO(data), allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise BadImage(name, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _from_array(array: np.ndarray, name: str) -> UInt8[np.ndarray, "H W 3"]:
  if array.ndim == 2:
    array = array[:, :, None]
  if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
    raise BadImage(name, f"is an array of shape {array.shape}, not [H, W] or [H, W, 1 to 4 channels]")
  _check_size(array.shape[1], array.shape[0], name)
  if array.dtype == bool:
    array = array.astype(np.uint8) * np.uint8(255)
  elif array.dtype != np.uint8:
    array = _deep_to_uint8(array)
  if array.shape[2] == 3:
    return array
  mode = {1: "L", 2: "LA", 4: "RGBA"}[array.shape[2]]
  return np.asarray(to_rgb(Image.fromarray(array[:, :, 0] if mode == "L" else array, mode)))


def _check_size(width: int, height: int, name: str):
  if min(width, height) < MIN_SIDE:
    raise BadImage(name, f"is {width} x {height} pixels: at least {MIN_SIDE} on each side are needed")
  if width * height > MAX_PIXELS:
    raise BadImage(name, f"is {width} x {height} pixels: more than {MAX_PIXELS:,} are refused")
