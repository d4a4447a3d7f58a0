"""Line charts drawn with PIL alone: axes, round ticks, grid, legend, reference lines.

    picture = draw([Panel("loss", [Series("dino", steps, values)], [Level("log K", 8.3)])], title="run 12")

Small on purpose: enough for the summary of a run without a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_SCALE = 2  # drawn this much larger, then reduced: smooth lines and text
_INK, _GREY, _GRID, _PAPER = "#22262b", "#5c6570", "#e4e7eb", "#ffffff"
_COLOURS = ("#2f6db3", "#d9792a", "#3b9a5b", "#b8405e", "#7a58a8", "#1f9aa8", "#8c6d46")
_LEVEL_COLOURS = ("#5c6570", "#a06a00", "#8a4f7d", "#4f7d5a")
_TEXT, _TITLE, _HEAD = 12, 15, 20  # font sizes in pixels of the finished picture
_LEFT, _RIGHT, _BOTTOM, _LEGEND_ROW = 66, 20, 34, 18


@dataclass(frozen=True)
class Series:
  """One curve. `trend` replaces noisy values by a bold running mean over a faint line; `dots` marks every value."""

  label: str
  x: Sequence[float]
  y: Sequence[float]
  trend: bool = False
  dots: bool = False


@dataclass(frozen=True)
class Level:
  """A horizontal dashed line: a value to compare with."""

  label: str
  value: float


@dataclass(frozen=True)
class Panel:
  """One pair of axes. `from_zero` makes the vertical axis begin at 0."""

  title: str
  series: Sequence[Series]
  levels: Sequence[Level] = field(default_factory=tuple)
  x_label: str = "step"
  from_zero: bool = False


def draw(
  panels: Sequence[Panel], *, columns: int = 3, title: str = "", panel_size: tuple[int, int] = (520, 330)
) -> UInt8[np.ndarray, "height width 3"]:
  """Draws panels in rows of `columns`; non-finite values make gaps, a panel without values says so."""
  columns = min(columns, max(1, len(panels)))
  rows = math.ceil(len(panels) / columns)
  width, height = panel_size
  head = _HEAD + 26 if title else 8
  canvas = _Canvas(columns * width, rows * height + head)
  if title:
    canvas.text(18, head / 2 + 4, title, size=_HEAD, anchor="lm")
  for i, panel in enumerate(panels):
    _draw_panel(canvas, panel, (i % columns) * width, head + (i // columns) * height, width, height)
  return canvas.finish()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """About `count` round numbers (steps of 1, 2, 2.5 or 5 times a power of ten) from low to high."""
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
  first = math.ceil(low / step - 1e-9)
  return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, digits: int = 4) -> str:
  """A short label for a tick: 0, 0.25, 20k, 1e-4."""
  if value == 0:
    return "0"
  size = abs(value)
  if size >= 1e6:
    return f"{value / 1e6:.{digits}g}M"
  if size >= 1e4:
    return f"{value / 1e3:.{digits}g}k"
  if size < 1e-3:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  return f"{value:.{digits}g}"


def labels(values: Sequence[float]) -> list[str]:
  """Labels of ticks, with as many digits as it takes to tell them apart."""
  for digits in range(4, 12):
    shown = [number(value, digits) for value in values]
    if len(set(shown)) == len(shown):
      break
  return shown


def trend(values: np.ndarray) -> np.ndarray:
  """Centred running mean over about a twentieth of the values (shorter at the ends); ignores non-finite ones."""
  half = len(values) // 40
  finite = np.isfinite(values)
  total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
  count = np.concatenate([[0], np.cumsum(finite)])
  i = np.arange(len(values))
  low, high = np.maximum(0, i - half), np.minimum(len(values), i + half + 1)
  mean = (total[high] - total[low]) / np.maximum(1, count[high] - count[low])
  return np.where(finite, mean, np.nan)


class _Canvas:
  """A PIL drawing in finished-picture coordinates."""

  def __init__(self, width: float, height: float):
    self._image = Image.new("RGB", (int(width * _SCALE), int(height * _SCALE)), _PAPER)
    self._draw = ImageDraw.Draw(self._image)
    self._fonts = {size: ImageFont.load_default(size * _SCALE) for size in (_TEXT, _TITLE, _HEAD)}

  def text(self, x, y, text, *, size=_TEXT, colour=_INK, anchor="lm"):
    self._draw.text((x * _SCALE, y * _SCALE), text, fill=colour, font=self._fonts[size], anchor=anchor)

  def text_width(self, text, size=_TEXT):
    return self._fonts[size].getlength(text) / _SCALE

  def line(self, points, colour, width=1.0):
    points = [(x * _SCALE, y * _SCALE) for x, y in points]
    self._draw.line(points, fill=colour, width=max(1, round(width * _SCALE)), joint="curve")

  def dashed(self, x0, x1, y, colour, width=1.3):
    x = x0
    while x < x1:
      self.line([(x, y), (min(x + 6, x1), y)], colour, width)
      x += 10

  def dot(self, x, y, colour, radius=2.6):
    self._draw.ellipse([((v + s * radius) * _SCALE) for s in (-1, 1) for v in (x, y)], fill=colour)

  def finish(self) -> np.ndarray:
    width, height = self._image.size
    return np.asarray(self._image.resize((width // _SCALE, height // _SCALE), Image.Resampling.LANCZOS))


def _draw_panel(canvas: _Canvas, panel: Panel, x: float, y: float, width: float, height: float) -> None:
  canvas.text(x + 18, y + 14, panel.title, size=_TITLE)
  top = _draw_legend(canvas, panel, x + 18, y + 34, width - 30) + 6
  left, right, bottom = x + _LEFT, x + width - _RIGHT, y + height - _BOTTOM
  raw = [(np.asarray(s.x, np.float64), np.asarray(s.y, np.float64)) for s in panel.series]
  if not any(np.isfinite(py).any() for _, py in raw):
    canvas.text((left + right) / 2, (top + bottom) / 2, "nothing recorded", colour=_GREY, anchor="mm")
    return
  shown = [trend(py) if s.trend else py for s, (_, py) in zip(panel.series, raw, strict=True)]
  x_low, x_high = _limits([px for px, _ in raw], pad=0.0)
  y_low, y_high = _limits([*shown, np.array([level.value for level in panel.levels])], pad=0.06)
  if panel.from_zero and min(py[np.isfinite(py)].min(initial=0.0) for py in shown) >= 0:
    y_low = 0.0

  def place(px, py):
    return (
      left + (px - x_low) / (x_high - x_low) * (right - left),
      bottom - (np.clip(py, y_low, y_high) - y_low) / (y_high - y_low) * (bottom - top),
    )

  marks = ticks(y_low, y_high)
  for value, label in zip(marks, labels(marks), strict=True):
    _, py = place(x_low, value)
    canvas.line([(left, py), (right, py)], _GRID)
    canvas.text(left - 7, py, label, colour=_GREY, anchor="rm")
  marks = ticks(x_low, x_high)
  for value, label in zip(marks, labels(marks), strict=True):
    px, _ = place(value, y_low)
    canvas.line([(px, bottom), (px, bottom + 4)], _GREY)
    canvas.text(px, bottom + 13, label, colour=_GREY, anchor="mm")
  canvas.line([(left, top), (left, bottom), (right, bottom)], _GREY)
  canvas.text(right, bottom + 27, panel.x_label, colour=_GREY, anchor="rm")
  for i, level in enumerate(panel.levels):
    if math.isfinite(level.value):
      canvas.dashed(left, right, place(x_low, level.value)[1], _LEVEL_COLOURS[i % len(_LEVEL_COLOURS)])
  for i, (series, (px, py), smooth) in enumerate(zip(panel.series, raw, shown, strict=True)):
    colour = _COLOURS[i % len(_COLOURS)]
    if series.trend:
      _draw_curve(canvas, *place(px, py), _faint(colour), 1.0, dots=False)
    _draw_curve(canvas, *place(px, smooth), colour, 2.0, dots=series.dots)


def _draw_curve(canvas: _Canvas, px, py, colour: str, width: float, *, dots: bool) -> None:
  finite = np.isfinite(px) & np.isfinite(py)
  edges = np.flatnonzero(np.diff(np.concatenate([[0], finite.astype(np.int8), [0]])))
  for start, stop in edges.reshape(-1, 2):  # runs of finite values
    points = list(zip(px[start:stop].tolist(), py[start:stop].tolist(), strict=True))
    if len(points) > 1:
      canvas.line(points, colour, width)
    for point in points if dots or len(points) == 1 else ():
      canvas.dot(*point, colour)


def _draw_legend(canvas: _Canvas, panel: Panel, x: float, y: float, width: float) -> float:
  """Entries in rows under the title, so that they never hide a curve; returns where the rows end."""
  entries = [(s.label, _COLOURS[i % len(_COLOURS)], False) for i, s in enumerate(panel.series)]
  entries += [
    (f"{level.label} {level.value:.3g}", _LEVEL_COLOURS[i % len(_LEVEL_COLOURS)], True)
    for i, level in enumerate(panel.levels)
  ]
  px = x
  for label, colour, dashed in entries:
    size = 24 + canvas.text_width(label) + 14
    if px > x and px + size > x + width:
      px, y = x, y + _LEGEND_ROW
    if dashed:
      canvas.dashed(px, px + 18, y, colour)
    else:
      canvas.line([(px, y), (px + 18, y)], colour, 2.5)
    canvas.text(px + 24, y, label)
    px += size
  return y + _LEGEND_ROW / 2


def _limits(values: Sequence[np.ndarray], *, pad: float) -> tuple[float, float]:
  everything = np.concatenate(values)
  everything = everything[np.isfinite(everything)]
  low, high = float(everything.min()), float(everything.max())
  if high - low < 1e-9 * max(1.0, abs(high)):  # one value: give it room
    room = 0.1 * abs(high) or 1.0
    return low - room, high + room
  return low - pad * (high - low), high + pad * (high - low)


def _faint(colour: str) -> str:
  channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
  return "#" + "".join(f"{round(255 - 0.35 * (255 - c)):02x}" for c in channels)
