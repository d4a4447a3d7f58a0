"""Tests of vit_jax/inspect/chart.py: what is drawn is where it should be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vit_jax.inspect.chart import Level, Panel, Series, draw, labels, number, ticks, trend

BLUE = np.array([0x2F, 0x6D, 0xB3])


def blue_pixels(picture, *, below=60):
  """Rows and columns (of the plot, under the legend) that are the colour of the first curve."""
  near = np.abs(picture.astype(int) - BLUE).max(axis=-1) < 40
  near[:below] = False
  return np.nonzero(near)


def test_a_rising_curve_rises_in_the_picture():
  rows, columns = blue_pixels(draw([Panel("a", [Series("y", range(50), range(50))])]))
  assert np.corrcoef(rows, columns)[0, 1] < -0.99
  assert columns.max() - columns.min() > 400 and rows.max() - rows.min() > 180


def test_panels_lie_in_rows_and_columns():
  panels = [Panel(str(i), [Series("y", [0, 1], [0, 1])]) for i in range(5)]
  assert draw(panels, columns=3, panel_size=(300, 200)).shape == (2 * 200 + 8, 3 * 300, 3)
  assert draw(panels[:2], columns=3, panel_size=(300, 200), title="run").shape == (200 + 46, 600, 3)


def test_values_that_are_not_finite_make_a_gap():
  y = np.full(100, 1.0)
  y[40:60] = np.nan
  _, columns = blue_pixels(draw([Panel("a", [Series("y", range(100), y)])]))
  assert np.diff(np.unique(columns)).max() > 0.15 * (columns.max() - columns.min())


@pytest.mark.parametrize("y", [[], [math.nan, math.nan]])
def test_a_panel_without_values_is_drawn(y):
  rows, _ = blue_pixels(draw([Panel("a", [Series("y", range(len(y)), y)])]))
  assert rows.size == 0


def test_a_single_value_is_a_dot():
  rows, columns = blue_pixels(draw([Panel("a", [Series("y", [3], [7.0])])]))
  assert 0 < np.ptp(rows) < 10 and 0 < np.ptp(columns) < 10


def test_levels_are_inside_the_picture():
  low = draw([Panel("a", [Series("y", [0, 1], [1.0, 1.1])])])
  high = draw([Panel("a", [Series("y", [0, 1], [1.0, 1.1])], [Level("far", 50.0)])])
  assert np.ptp(blue_pixels(high)[0]) < 0.1 * np.ptp(blue_pixels(low)[0])


@pytest.mark.parametrize(
  ("low", "high", "expected"),
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (0, 3000, [0, 1000, 2000, 3000]),
    (-0.13, 0.52, [0, 0.2, 0.4]),
    (5.1, 5.13, [5.1, 5.11, 5.12, 5.13]),
  ],
)
def test_ticks_are_round(low, high, expected):
  assert ticks(low, high) == pytest.approx(expected)


def test_numbers_are_short():
  shown = [number(v) for v in (0, 0.25, 1e-4, -3.0, 2000, 20000, 2.5e6)]
  assert shown == ["0", "0.25", "1e-4", "-3", "2000", "20k", "2.5M"]


def test_ticks_close_together_have_labels_that_differ():
  assert labels([6.9311, 6.9312, 6.9313]) == ["6.9311", "6.9312", "6.9313"]
  assert labels([0, 100, 200]) == ["0", "100", "200"]
  assert labels([]) == []


def test_the_trend_is_the_mean_and_keeps_gaps():
  noisy = np.tile([0.0, 2.0], 200)
  assert np.allclose(trend(noisy)[20:-20], 1.0, atol=0.1)
  noisy[100] = np.nan
  assert np.isnan(trend(noisy)[100]) and np.isfinite(trend(noisy)).sum() == 399
