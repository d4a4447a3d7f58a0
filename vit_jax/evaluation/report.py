"""Results as people read them: a table of the model next to the baselines, on the terminal and in files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax.evaluation.errors import EvaluationError, reasons
from vit_jax.evaluation.names import with_k

if TYPE_CHECKING:
  from rich.table import Table

ENDINGS = (".json", ".md")

_BASELINE = "baseline"
_MODEL = "model"
# What was scored, in words; other names (of baselines that the caller adds) stand for themselves.
_HEADS = {
  _MODEL: "this model",
  "untrained": "untrained",
  "pixels": "pixels",
  "histogram": "colours",
  "majority": "most frequent class",
}


def columns(results: Mapping[str, float]) -> dict[str, dict[str, float]]:
  """Sorts flat results by what was scored: name ("model", a baseline's) -> metric -> value; the model first."""
  table: dict[str, dict[str, float]] = {}
  for key, value in results.items():
    name, metric = _MODEL, key
    if key.startswith(f"{_BASELINE}/"):
      _, name, metric = key.split("/", 2)
    table.setdefault(name, {})[metric] = value
  return {name: table[name] for name in sorted(table, key=lambda name: name != _MODEL)}


def rich_table(results: Mapping[str, float], *, title: str | None = None) -> Table:
  """The results for a terminal: `rich.print(rich_table(results))`."""
  from rich.table import Column, Table

  heads, lines = _cells(columns(results))
  view = Table(Column("metric", overflow="fold"), title=title)  # a name is never cut
  for head in heads:
    view.add_column(head, justify="right")
  for metric, cells in lines.items():
    view.add_row(metric, *cells)
  return view


def markdown(
  results: Mapping[str, float], *, about: Mapping[str, Any] | None = None, failed: Mapping[str, str] | None = None
) -> str:
  """The results as a Markdown table, under what they are about (model, sources, ...) and what has none as a list."""
  heads, lines = _cells(columns(results))
  text = [f"- {key}: {value}" for key, value in (about or {}).items()]
  text += [f"- {line}" for line in reasons(failed or {})]
  text += [""] if text else []
  text += ["| metric | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
  text += [f"| {metric} | {' | '.join(cells)} |" for metric, cells in lines.items()]
  return "\n".join(text) + "\n"


def save(
  path: str | os.PathLike,
  results: Mapping[str, float],
  *,
  about: Mapping[str, Any] | None = None,
  failed: Mapping[str, str] | None = None,
) -> None:
  """Writes the results to a file, in folders made if need be.

  Args:
    path: ends in ".md" (see `markdown`) or ".json" ({"about": ..., "results": ...} and, if there is any, "failed").
    results: as `evaluate` returns them.
    about: what they are about.
    failed: what has no score -> why, as of `Incomplete`.

  Raises:
    EvaluationError: for another ending, or where it cannot be written.
  """
  check_path(path)
  path = Path(path)
  if path.suffix.lower() == ".md":
    text = markdown(results, about=about, failed=failed)
  else:
    content = {"about": dict(about or {}), "results": dict(results)} | ({"failed": dict(failed)} if failed else {})
    text = json.dumps(content, indent=2) + "\n"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
  except OSError as error:
    raise EvaluationError(f"{path}: the scores cannot be written there: {error.strerror or error}.") from error


def check_path(path: str | os.PathLike) -> None:
  """Raises EvaluationError unless `save` can write to such a file: one of `ENDINGS`, or a device or pipe (JSON)."""
  path = Path(path)
  if path.suffix.lower() in ENDINGS or path.is_relative_to("/dev") or (path.exists() and not path.is_file()):
    return
  raise EvaluationError(f"Results are written as .json or .md, so the file cannot be {os.fspath(path)!r}.")


def _cells(table: Mapping[str, Mapping[str, float]]) -> tuple[list[str], dict[str, list[str]]]:
  """Column heads, and metric -> one text per column; empty where a column has no such metric."""
  metrics = dict.fromkeys(metric for values in table.values() for metric in values)
  lines = {
    with_k(metric, metrics): [_text(metric, values.get(metric)) for values in table.values()] for metric in metrics
  }
  return [_HEADS.get(name, name) for name in table], lines


def _text(metric: str, value: float | None) -> str:
  if value is None:
    return ""
  return f"{100 * value:.1f} %" if metric.endswith("top1") else f"{value:g}"
