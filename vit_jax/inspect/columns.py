"""Cells as lines of aligned columns, within the width of a terminal where there is one."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

_GAP = 2  # spaces between columns
_LEAST = 10  # characters that a column keeps
_PROSE = 24  # characters in which words are wrapped rather than moved to a line of their own
_INDENT = 4  # of what has no place elsewhere


def terminal_width() -> int | None:
  """Characters of a line of what standard output is shown on: COLUMNS, or those of the terminal; None: no terminal."""
  if os.environ.get("COLUMNS", "").isdecimal() or sys.stdout.isatty():
    return shutil.get_terminal_size().columns
  return None


def align(
  rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), keep: Sequence[int] = (), width: int | None = None
) -> str:
  """Rows of cells as lines of aligned columns.

  A row whose cells do not fit into `width` becomes several lines: a cell that is too long for its column has the line
  to its end, what follows it comes below, at its place. Words of the last column are wrapped there. Nothing is lost.

  Args:
    rows: of as many cells each.
    right: columns aligned on the right.
    keep: columns that keep their width besides those.
    width: of the longest line; None: as long as it comes.
  """
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  if width is not None:
    widths = _narrowed(widths, {*right, *keep}, width)
  stops = [sum(widths[:i]) + _GAP * i for i in range(len(widths))]
  return "\n".join(line for row in rows for line in _lines(row, widths, stops, right, width))


def _narrowed(widths: list[int], fixed: set[int], width: int) -> list[int]:
  """Widths of columns that fit, the widest of those that are not fixed having given most."""
  widths, free = list(widths), [i for i in range(len(widths)) if i not in fixed]
  while sum(widths) + _GAP * (len(widths) - 1) > width:
    widest = max(free, key=lambda i: widths[i], default=None)
    if widest is None or widths[widest] <= _LEAST:
      break
    widths[widest] -= 1
  return widths


def _lines(
  row: Sequence[str], widths: list[int], stops: list[int], right: Sequence[int], width: int | None
) -> list[str]:
  lines, line = [], ""
  last = max((i for i, cell in enumerate(row) if cell), default=-1)
  for i, cell in enumerate(row[: last + 1]):
    if not cell:
      continue
    if len(line) > max(stops[i] - _GAP, 0):  # what comes before reaches in here
      lines.append(line)
      line = ""
    text = cell.rjust(widths[i]) if i in right else cell
    line = line.ljust(stops[i])
    if width is None or stops[i] + len(text) <= width:
      line += text
      continue
    first, *more = _placed(cell, line, stops[: i + 1], wrap=i == len(row) - 1, width=width)
    lines += [first] if first.strip() else []
    lines += more
    line = lines.pop()
  return [one.rstrip() for one in [*lines, line]]


def _placed(cell: str, line: str, stops: list[int], *, wrap: bool, width: int) -> list[str]:
  """A line and those after it with a cell that does not fit behind it: wrapped there, or further left below."""
  room = width - stops[-1]
  if wrap and room >= _PROSE and max(map(len, cell.split())) <= room:
    first, *more = textwrap.wrap(cell, room, break_long_words=False, break_on_hyphens=False)
    return [line + first, *(" " * stops[-1] + part for part in more)]
  stop = max((stop for stop in stops if stop and stop + len(cell) <= width), default=_INDENT)
  parts = textwrap.wrap(cell, width - stop, break_on_hyphens=False)
  return [line.rstrip(), *(" " * stop + part for part in parts)]
