"""Image files and arrays of any common kind -> one form: uint8 [H, W, C], RGB unless other channels are asked for.

What is decided here, once for every source:
  * EXIF orientation is applied.
  * Samples of more than 8 bits come down to 8 by a range that is the same for all images: `value_range`, or else 0 to
    65535 for 16 bits (their high byte; of 32-bit integers too, as far as 16 bits suffice) and 0 to 1 for floats.
  * RGB: transparent pixels are seen on white: what lies under them is arbitrary. Grey becomes three equal channels;
    palettes, CMYK, YCbCr and Lab become RGB; of an animation the first frame counts.
  * Other numbers of channels: the image must have exactly so many, which are taken as they are (`multiband.py`).
  * What cannot be decoded completely, or is unreasonably large or small, is a `BadImage` that names it.
"""

from __future__ import annotations

import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_jax.data import jpeg, multiband

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


class OtherChannels(BadImage):
  """An image that has not the channels that all images should have; `fewest`: those that it may have itself."""

  def __init__(self, name: str, reason: str, fewest: int | None = None):
    super().__init__(name, reason)
    self.fewest = fewest


def decode(
  data: bytes | os.PathLike | np.ndarray,
  name: str = "image",
  *,
  enough: int | None = None,
  fits: tuple[int, int] | None = None,
  channels: int = 3,
  value_range: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "H W C"]:
  """Decodes an encoded image (bytes or a file's path), or brings an array into the form of a decoded one.

  Args:
    data: the encoded image (also a .npy file), a path to it, or an array [H, W], [H, W, 1], [H, W, 2] (grey, alpha),
      [H, W, 3] or [H, W, 4] of uint8, uint16, or floats; for C other channels [H, W, C] or [C, H, W].
    name: what to call it in an error.
    enough: a JPEG whose short side has at least twice as many pixels as this comes out at 1/2, 1/4 or 1/8 of its size,
      no smaller than this: decoding a photograph of 12 megapixels takes a fraction of the time so. None: full size.
    fits: (height, width) into which the image will have to fit: a JPEG that is at least twice as large comes out
      smaller too, but no smaller than what just fits.
    channels: C. 3: RGB, which every image becomes; another number: those of the image, which must have so many.
    value_range: values that become 0 and 255 (what lies outside is cut off) of samples that do not have 8 bits; those
      of 8 bits stay as they are. None: as above.

  Raises:
    BadImage: if it is missing, empty, truncated, corrupt, of no known format, larger than `MAX_PIXELS` or has a side
      below `MIN_SIDE`.
    OtherChannels: a BadImage, if it has other channels.
    ImportError: for a TIFF that Pillow cannot read, without tifffile.
  """
  if isinstance(data, bytes) and not data:
    raise BadImage(name, "the file is empty")
  if isinstance(data, bytes) and data.startswith(_NUMPY):
    data = _saved_array(data, name)
  if isinstance(data, np.ndarray):
    return _from_array(data, name, channels, value_range)
  try:
    # The formats' decoders raise almost anything on damaged input (OSError, SyntaxError, struct.error, IndexError, …).
    samples = multiband.read(data, channels, deep=value_range is not None)
    if samples is not None:
      return _from_array(samples, name, channels, value_range)
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
      _check_size(image.width, image.height, name)
      if channels != 3:
        return _from_array(np.asarray(_upright(image)), name, channels, value_range)
      if image.format == "JPEG":
        shrunk = jpeg.shrinking(image.size, enough, fits)
        pixels = jpeg.decode_rgb(image, data, shrunk)
        if pixels is not None:
          return _turned(pixels, image)
        if shrunk > 1:
          image.draft(None, (image.width // shrunk, image.height // shrunk))
      return np.asarray(to_rgb(_upright(image), value_range))  # [H, W, 3]
  except (BadImage, ImportError):
    raise
  except UnidentifiedImageError as error:
    raise BadImage(name, "is no image of a known format") from error
  except Exception as error:
    raise BadImage(name, f"cannot be decoded ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
  """Any Pillow mode -> RGB, by the rules at the top of this file."""
  if image.mode == "RGB":
    image.load()
    return image
  if image.mode == "F" or image.mode.startswith("I"):
    return Image.fromarray(_deep_to_uint8(np.asarray(image), value_range)).convert("RGB")
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


def _deep_to_uint8(samples: np.ndarray, value_range: tuple[float, float] | None) -> UInt8[np.ndarray, " ..."]:
  """Samples of more than 8 bits -> uint8, by the rules at the top of this file."""
  if value_range is None and not np.issubdtype(samples.dtype, np.floating):
    # Pillow gives 16-bit files as 32-bit integers too: what fits in 16 bits is taken for 16-bit.
    wide = samples.dtype.itemsize > 2 and samples.size > 0 and int(samples.max()) >= 1 << 16
    return np.clip(samples >> (24 if wide else 8), 0, 255).astype(np.uint8)
  low, high = value_range or (0.0, 1.0)
  levels = (np.clip(samples, low, high).astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
  return (np.nan_to_num(levels) + np.float32(0.5)).astype(np.uint8)


def _saved_array(data: bytes, name: str) -> np.ndarray:
  """The array in a .npy file."""
  try:
    return np.load(io.BytesIO(data), allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise BadImage(name, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _from_array(
  array: np.ndarray, name: str, channels: int, value_range: tuple[float, float] | None
) -> UInt8[np.ndarray, "H W C"]:
  if array.ndim == 2:
    array = array[:, :, None]
  if channels != 3:
    array = _of_channels(array, name, channels)
  elif array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
    fewest = min(array.shape[0], array.shape[-1]) if array.ndim == 3 else 0
    hint = f" (for other channels set model.in_channels={fewest})" if fewest else ""
    reason = f"is an array of shape {array.shape}, not [H, W] or [H, W, 1 to 4 channels]{hint}"
    raise OtherChannels(name, reason, fewest or None)
  _check_size(array.shape[1], array.shape[0], name)
  if array.dtype == bool:
    array = array.astype(np.uint8) * np.uint8(255)
  elif array.dtype != np.uint8:
    array = _deep_to_uint8(array, value_range)
  if channels != 3 or array.shape[2] == 3:
    return array
  mode = {1: "L", 2: "LA", 4: "RGBA"}[array.shape[2]]
  return np.asarray(to_rgb(Image.fromarray(array[:, :, 0] if mode == "L" else array, mode)))


def _of_channels(array: np.ndarray, name: str, channels: int) -> np.ndarray:
  """The array as [H, W, C]; the channels of [C, H, W] move to the end, unless the last axis has as many itself."""
  if array.ndim == 3 and array.shape[2] != channels and array.shape[0] == channels:
    array = np.moveaxis(array, 0, 2)
  if array.ndim != 3 or array.shape[2] != channels:
    found = f"{array.shape[2]} channel(s)" if array.ndim == 3 else f"the shape {array.shape}"
    raise OtherChannels(name, f"has {found}, not the {channels} of model.in_channels")
  return array


def _check_size(width: int, height: int, name: str):
  if min(width, height) < MIN_SIDE:
    raise BadImage(name, f"is {width} x {height} pixels: at least {MIN_SIDE} on each side are needed")
  if width * height > MAX_PIXELS:
    raise BadImage(name, f"is {width} x {height} pixels: more than {MAX_PIXELS:,} are refused")
