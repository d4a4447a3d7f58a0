"""Arrays as images: .npy files, read without trusting what their headers claim, and the places of their axes."""

from __future__ import annotations

import io
import math

import numpy as np

from vit_jax.data.errors import BadImage, OtherChannels
from vit_jax.data.levels import KINDS
from vit_jax.data.limits import Limits

_RGB = (1, 2, 3, 4)  # channels of what becomes RGB: grey, grey and alpha, RGB, RGB and alpha


def saved_array(data: bytes, name: str) -> np.ndarray:
  """The array in the bytes of a .npy file; it shares their memory.

  Raises:
    BadImage: if it is no array of numbers, or claims more bytes than there are.
    Exception: almost any, for a header that is damaged.
  """
  file = io.BytesIO(data)
  version = np.lib.format.read_magic(file)
  # Version 3 has names of fields beyond Latin-1, which an array of numbers has not: it reads as version 2.
  header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, fortran, dtype = header(file)
  _check_kind(dtype, name)
  if min(shape, default=0) < 0:
    raise BadImage(name, f"is an array of shape {shape}, which cannot be")
  start, claimed = file.tell(), math.prod(shape) * dtype.itemsize
  if claimed > 1 << 62:
    raise BadImage(name, "cannot be decoded: its header claims more bytes than any memory has")
  if claimed > len(data) - start:
    rest = len(data) - start
    raise BadImage(name, f"cannot be decoded: its header claims {claimed:,} bytes, of which {rest:,} are there")
  array = np.frombuffer(data, dtype, math.prod(shape), start)
  return array.reshape(shape, order="F" if fortran else "C")


def channels_last(array: np.ndarray, name: str, channels: int, limits: Limits) -> np.ndarray:
  """An array [H, W] or [H, W, C] or [C, H, W] of numbers as [H, W, C], in the machine's byte order.

  Args:
    array: what to bring into this form.
    name: of the image.
    channels: that it must have; 3: those of RGB, grey or with alpha, too. Where the last axis has a fitting length, it
      is that of the channels, else the first.
    limits: on its size.

  Raises:
    BadImage: if it is no array of numbers or of a size that is refused.
    OtherChannels: if it has other channels.
  """
  first = channels_are_first(array.shape, array.dtype, name, channels, limits)
  if array.ndim == 2:
    array = array[:, :, None]
  return np.ascontiguousarray(np.moveaxis(array, 0, 2) if first else array, array.dtype.newbyteorder("="))


def channels_are_first(shape: tuple[int, ...], dtype: np.dtype, name: str, channels: int, limits: Limits) -> bool:
  """Whether an array is [C, H, W], from its shape alone; arguments and exceptions are those of `channels_last`."""
  _check_kind(dtype, name)
  wanted = _RGB if channels == 3 else (channels,)
  sides = (*shape, 1) if len(shape) == 2 else shape
  first = len(sides) == 3 and sides[2] not in wanted and sides[0] in wanted
  if first:
    sides = (*sides[1:], sides[0])
  if len(sides) != 3 or sides[2] not in wanted:
    raise _other_channels(shape, name, channels)
  limits.check_size(sides[1], sides[0], name, pixel_bytes=sides[2] * dtype.itemsize)
  return first


def _check_kind(dtype: np.dtype, name: str) -> None:
  if dtype.hasobject:
    raise BadImage(name, "is an array of Python objects, which are never loaded: save it as an array of numbers")
  if dtype.kind not in KINDS or dtype.names is not None or dtype.subdtype is not None:
    raise BadImage(name, f"is an array of type {str(dtype)[:80]}: images are of integers, floats or booleans")


def _other_channels(shape: tuple[int, ...], name: str, channels: int) -> BadImage:
  fewest = min(shape[0], shape[-1]) if len(shape) == 3 else None
  if channels == 3:
    hint = f" (for other channels set model.in_channels={fewest})" if fewest else ""
    reason = f"is an array of shape {shape}, not [H, W] or [H, W, 1 to 4 channels]{hint}"
    return OtherChannels(name, reason, fewest or None)
  found = {2: "1 channel(s)", 3: f"{shape[-1]} channel(s)"}.get(len(shape), f"the shape {shape}")
  return OtherChannels(name, f"has {found}, not the {channels} of model.in_channels")
