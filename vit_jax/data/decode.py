"""Image files and arrays of any common kind -> one form: uint8 [H, W, C], RGB unless other channels are asked for.

What is decided here, once for every source:
  * What a file is, its content says, not its name; formats are those of `formats.py`, and no other decoder is tried.
  * EXIF orientation is applied.
  * Samples of more than 8 bits come down to 8 by a rule that is the same for all images (`levels.py`).
  * RGB: transparent pixels are seen on white: what lies under them is arbitrary. Grey becomes three equal channels;
    palettes, CMYK, YCbCr and Lab become RGB; of an animation the first frame counts.
  * Other numbers of channels: the image must have exactly so many, which are taken as they are (`multiband.py`).
  * What cannot be decoded completely, whatever its decoder raises, is a `BadImage` that names it; so is what is beyond
    the bounds on bytes and pixels (`limits.py`), before memory is taken for it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from vit_jax.data import formats, jpeg, levels, multiband, storage, tiff
from vit_jax.data.arrays import channels_last, saved_array
from vit_jax.data.errors import BadImage, NeedsPackage, OtherChannels, UnknownRange, in_words
from vit_jax.data.limits import DEFAULT, Limits
from vit_jax.data.opening import known_format, open_image

__all__ = ["BadImage", "NeedsPackage", "OtherChannels", "UnknownRange", "Samples", "decode", "read_samples", "scaled"]

_ORIENTATION = 0x0112  # the EXIF tag
_STRIP = 1 << 22  # pixels that are laid on white at a time


class Samples(NamedTuple):
  """A decoded image before its values are scaled: `levels` does this."""

  array: np.ndarray  # [H, W, C]
  kind: str  # format and mode, in words
  size: tuple[int, int]  # width and height as stored; a JPEG may be decoded smaller
  bits: int | None = None  # of a value, where the file says so
  white_is_zero: bool = False


def decode(
  data: bytes | os.PathLike | np.ndarray,
  name: str = "image",
  *,
  enough: int | None = None,
  fits: tuple[int, int] | None = None,
  channels: int = 3,
  value_range: tuple[float, float] | None = None,
  limits: Limits = DEFAULT,
) -> UInt8[np.ndarray, "H W C"]:
  """Decodes an encoded image (bytes or a file's path), or brings an array into the form of a decoded one.

  Args:
    data: the encoded image (also a .npy file), a path to it, or an array [H, W], [H, W, 1], [H, W, 2] (grey, alpha),
      [H, W, 3] or [H, W, 4] of booleans, integers or floats; for C other channels [H, W, C]. Channels may come first,
      [C, H, W], where the last axis has another length.
    name: what to call it in an error.
    enough: a JPEG whose short side has at least twice as many pixels as this comes out at 1/2, 1/4 or 1/8 of its size,
      no smaller than this: decoding a photograph of 12 megapixels takes a fraction of the time so. None: full size.
    fits: (height, width) into which the image will have to fit: a JPEG that is at least twice as large comes out
      smaller too, but no smaller than what just fits.
    channels: C. 3: RGB, which every image becomes; another number: those of the image, which must have so many.
    value_range: values that become 0 and 255 (what lies outside is cut off) of samples that do not have 8 bits; those
      of 8 bits stay as they are. None: by their type (`levels.py`).
    limits: bounds on bytes and pixels of the image as it is stored, however small it comes out.

  Raises:
    BadImage: if it is missing, empty, truncated, corrupt, of no known format, beyond the limits, or no image at all.
    OtherChannels: a BadImage, if it has other channels.
    UnknownRange: a BadImage, if its values mean nothing without a `value_range`.
    NeedsPackage: a BadImage, if the package that decodes it is not installed.
  """
  with _boundary(name):
    samples = _read(data, name, enough, fits, channels, value_range is not None, limits)
    return _scaled(samples, name, channels, value_range)


def read_samples(
  data: bytes | np.ndarray,
  name: str = "image",
  *,
  enough: int | None = None,
  channels: int = 3,
  deep: bool = True,
  limits: Limits = DEFAULT,
) -> Samples:
  """What `decode` scales to 8 bits; its arguments and exceptions. `deep`: with all bits, as where a range is given."""
  with _boundary(name):
    return _read(data, name, enough, None, channels, deep, limits)


def scaled(
  samples: Samples, name: str = "image", *, channels: int = 3, value_range: tuple[float, float] | None = None
) -> UInt8[np.ndarray, "H W C"]:
  """What `decode` makes of samples that were read before."""
  with _boundary(name):
    return _scaled(samples, name, channels, value_range)


@contextlib.contextmanager
def _boundary(name: str) -> Iterator[None]:
  """Decoders raise almost anything on damaged input, from OSError to struct.error: all of it is a BadImage."""
  try:
    yield
  except BadImage:
    raise
  except Exception as error:
    raise BadImage(name, f"cannot be decoded ({in_words(error)})") from error


def _read(
  data: bytes | os.PathLike | np.ndarray,
  name: str,
  enough: int | None,
  fits: tuple[int, int] | None,
  channels: int,
  deep: bool,
  limits: Limits,
) -> Samples:
  """The image before its values are scaled; `deep`: with all the bits of those that have more than 8."""
  if isinstance(data, os.PathLike):
    data = storage.read(pathlib.Path(data), limits)
  if isinstance(data, bytearray | memoryview):
    data = bytes(data)
  if isinstance(data, np.ndarray):
    return _array(data, "array", name, channels, limits)
  if not isinstance(data, bytes):
    raise BadImage(name, f"is no image but of type {type(data).__name__}")
  limits.check_bytes(len(data), name)
  format = known_format(data, name)
  if format is formats.NPY:
    return _array(saved_array(data, name), "array", name, channels, limits)
  if format is formats.TIFF:
    return _tiff(data, name, channels, deep, limits)
  with open_image(data, name, format, limits) as image:
    kind = f"{image.format} {image.mode}"
    # A colour of 16 bits that stands for transparency is not found among the high bytes that Pillow would keep.
    whole = deep or (channels == 3 and "transparency" in image.info)
    if whole and (values := multiband.several_bands(data, name, format, image)) is not None:
      samples = _array(values.array, image.format, name, channels, limits, bits=values.bits)
      return samples._replace(array=_turned(samples.array, _orientation(image)))
    if channels != 3:
      samples = _array(np.asarray(_upright(image)), image.format, name, channels, limits)
      return samples._replace(kind=kind, size=image.size)
    if image.format == "JPEG":
      shrunk = jpeg.shrinking(image.size, enough, fits)
      pixels = jpeg.decode_rgb(image, data, shrunk)
      if pixels is not None:
        return Samples(_turned(pixels, _orientation(image) if "exif" in image.info else 1), kind, image.size)
      if shrunk > 1:
        image.draft(None, (image.width // shrunk, image.height // shrunk))
    return _opened(image, kind, name, None, limits)


def _tiff(data: bytes, name: str, channels: int, deep: bool, limits: Limits) -> Samples:
  """By Pillow what this reads whole, the rest by tifffile."""
  header = tiff.read_header(data, name, limits)
  # Of several deep bands Pillow keeps the high bytes, and of those one after the other it makes noise.
  several = header.samples > 1 and header.bits > 8
  if channels == 3 and not (several and (header.separate or (deep and header.plain))):
    try:
      image = open_image(data, name, formats.TIFF, limits)
    except BadImage as error:
      if not isinstance(error.__cause__, Image.UnidentifiedImageError):
        raise
    else:
      with image:
        return _opened(image, f"TIFF {image.mode}", name, header, limits)
  values = tiff.read_bands(data, name, channels, limits)
  if channels == 3:
    values = tiff.without_extra(values, header, name)
  samples = _array(values, "TIFF", name, channels, limits, bits=header.fewer_bits)
  inverted = header.white_is_zero and channels == 3
  return samples._replace(array=_turned(samples.array, header.orientation), white_is_zero=inverted)


def _opened(image: Image.Image, kind: str, name: str, header: tiff.Header | None, limits: Limits) -> Samples:
  """An image that Pillow has opened, as RGB or, of one band of more than 8 bits, as it is."""
  size, image = image.size, _upright(image)
  if image.mode == "F" or image.mode.startswith("I"):
    values = multiband.one_band(image, header)
    inverted = header is not None and header.white_is_zero  # Pillow inverts those of 8 bits and fewer only
    return Samples(channels_last(values.array, name, 3, limits), kind, size, values.bits, inverted)
  return Samples(np.asarray(_to_rgb(image)), kind, size)


def _array(
  array: np.ndarray, kind: str, name: str, channels: int, limits: Limits, *, bits: int | None = None
) -> Samples:
  array = channels_last(array, name, channels, limits)
  height, width, number = array.shape
  return Samples(array, f"{kind} {array.dtype.name} x {number}", (width, height), bits)


def _scaled(
  samples: Samples, name: str, channels: int, value_range: tuple[float, float] | None
) -> UInt8[np.ndarray, "H W C"]:
  array = levels.to_uint8(samples.array, name, value_range, bits=samples.bits)
  if samples.white_is_zero:
    array = 255 - array
  if channels != 3 or array.shape[2] == 3:
    return array
  if array.shape[2] == 1:
    return np.repeat(array, 3, axis=2)
  return np.asarray(_to_rgb(Image.fromarray(array, {2: "LA", 4: "RGBA"}[array.shape[2]])))


def _to_rgb(image: Image.Image) -> Image.Image:
  """Any Pillow mode of 8 bits -> RGB, by the rules at the top of this file."""
  image.load()
  if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
    return image if image.mode == "RGB" else image.convert("RGB")
  flat = Image.new("RGB", image.size)
  rows = max(1, _STRIP // image.width)
  for top in range(0, image.height, rows):  # a few at a time: this takes several copies
    strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
    white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
    flat.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
  return flat


def _upright(image: Image.Image) -> Image.Image:
  """The image as its EXIF orientation wants it shown; a damaged EXIF block counts as none."""
  return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # the picture itself may be fine
    return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Pixels [H, W] or [H, W, C] of a file as its EXIF orientation wants them shown."""
  if orientation not in range(2, 9):
    return pixels
  if orientation >= 5:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (2, 3, 7, 8):  # left and right change places
    pixels = pixels[:, ::-1] if orientation in (2, 3) else pixels[::-1]
  if orientation in (3, 4, 6, 7):
    pixels = pixels[::-1] if orientation in (3, 4) else pixels[:, ::-1]
  return np.ascontiguousarray(pixels)
