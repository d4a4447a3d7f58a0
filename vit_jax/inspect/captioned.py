"""A sheet of small pictures, each with some lines of text beneath it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_jax.inspect.pictures import Picture

_GAP, _FONT, _LINE, _TITLE = 8, 11, 14, 24
_PAPER, _INK, _PALE = (255, 255, 255), (40, 44, 52), (110, 116, 126)
_CHARACTERS = 6.2  # pixels of one, about, for wrapping titles


def captioned_sheet(
  rows: Sequence[tuple[str, Sequence[tuple[Picture, Sequence[str]]]]], *, side: int = 150, per_line: int = 10
) -> Picture:
  """Rows of (title, [(picture, lines of its caption)]).

  Args:
    rows: what to show; the captions' lines should fit the width of a picture.
    side: pictures smaller than this are enlarged by a whole factor, until they are as wide.
    per_line: pictures side by side; the rest of a row goes on below.
  """
  font, title_font = ImageFont.load_default(_FONT), ImageFont.load_default(_FONT + 3)
  lines = []  # (title or None, cells)
  for title, cells in rows:
    shown = [(_enlarged(picture, side), captions) for picture, captions in cells]
    for i in range(0, len(shown), per_line):
      lines.append((title if i == 0 else None, shown[i : i + per_line]))
  widths = [sum(picture.shape[1] + _GAP for picture, _ in cells) + _GAP for _, cells in lines]
  heights = [_TITLE * (title is not None) + max(_height(*cell) for cell in cells) + _GAP for title, cells in lines]
  sheet = Image.new("RGB", (max(widths), sum(heights) + _GAP), _PAPER)
  draw = ImageDraw.Draw(sheet)
  top = _GAP
  for (title, cells), height in zip(lines, heights, strict=True):
    left, below = _GAP, top
    if title is not None:
      short = textwrap.shorten(title, max(20, int(sheet.width / (_CHARACTERS + 1.5))), placeholder=" …")
      draw.text((left, top + _TITLE / 2), short, fill=_INK, font=title_font, anchor="lm")
      below += _TITLE
    for picture, captions in cells:
      sheet.paste(Image.fromarray(picture), (left, below))
      for i, caption in enumerate(captions):
        draw.text((left, below + picture.shape[0] + 2 + i * _LINE), caption, fill=_PALE if i else _INK, font=font)
      left += picture.shape[1] + _GAP
    top += height
  return np.asarray(sheet)


def _height(picture: Picture, captions: Sequence[str]) -> int:
  return picture.shape[0] + 4 + _LINE * len(captions)


def _enlarged(picture: Picture, side: int) -> Picture:
  factor = max(1, math.ceil(side / picture.shape[1]))
  return picture.repeat(factor, axis=0).repeat(factor, axis=1)
