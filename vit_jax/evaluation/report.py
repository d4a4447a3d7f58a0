"""Results as people read them: a table of the model next to the baselines, on the terminal and in files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from rich.table import Table

_BASELINE = "baseline"
_MODEL = "model"
# What the rows are, in words; other names (of baselines that the caller adds) stand for themselves.
_ROWS = {
  _MODEL: "this model",
  "random_init": "same network, untrained",
  "pixels": "pixels, 16x16",
  "histogram": "colour histogram, 6x6x6",
  "majority": "most frequent class",
}


def rows(results: Mapping[str, float]) -> tuple[list[str], dict[str, dict[str, float]]]:
  """Sorts flat results into a table: the names of the columns, and row name -> column -> value; the model first."""
  table: dict[str, dict[str, float]] = {}
  for key, value in results.items():
    row, column = _MODEL, key
    if key.startswith(f"{_BASELINE}/"):
      _, row, column = key.split("/", 2)
    table.setdefault(row, {})[column] = value
  columns = list(dict.fromkeys(column for values in table.values() for column in values))
  return columns, {row: table[row] for row in sorted(table, key=lambda row: row != _MODEL)}


def rich_table(results: Mapping[str, float], *, title: str | None = None) -> Table:
  """The results for a terminal: `rich.print(rich_table(results))`."""
  from rich.table import Table

  columns, table = rows(results)
  view = Table("features", title=title)
  for column in columns:
    view.add_column(column, justify="right")
  for row, values in table.items():
    view.add_row(_ROWS.get(row, row), *_cells(columns, values), style="bold" if row == _MODEL else None)
  return view


def markdown(results: Mapping[str, float], *, about: Mapping[str, Any] | None = None) -> str:
  """The results as a Markdown table, under what they are about (model, sources, ...) as a list."""
  columns, table = rows(results)
  lines = [f"- {key}: {value}" for key, value in (about or {}).items()]
  lines += [""] if lines else []
  lines += ["| features | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
  lines += [f"| {_ROWS.get(row, row)} | {' | '.join(_cells(columns, values))} |" for row, values in table.items()]
  return "\n".join(lines) + "\n"


def save(folder: str | os.PathLike, results: Mapping[str, float], *, about: Mapping[str, Any] | None = None) -> None:
  """Writes `evaluation.json` ({"about": ..., "results": ...}) and `evaluation.md` into `folder`, made if need be."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  content = json.dumps({"about": dict(about or {}), "results": dict(results)}, indent=2)
  (folder / "evaluation.json").write_text(content + "\n", encoding="utf-8")
  (folder / "evaluation.md").write_text(markdown(results, about=about), encoding="utf-8")


def _cells(columns: Sequence[str], values: Mapping[str, float]) -> list[str]:
  return [_cell(column, values[column]) if column in values else "" for column in columns]


def _cell(column: str, value: float) -> str:
  return f"{100 * value:.1f} %" if column.endswith("top1") else f"{value:g}"
