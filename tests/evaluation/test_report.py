"""Results as tables and files."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from vit_jax.evaluation.errors import EvaluationError
from vit_jax.evaluation.report import markdown, rich_table, save

RESULTS = {
  "baseline/pixels/knn/top1": 0.05,
  "knn/top1": 0.61249,
  "linear/top1": 0.7,
  "linear/lr": 0.002,
  "baseline/untrained/knn/top1": 0.09,
  "baseline/pixels/linear/top1": 0.06,
}


def test_markdown_puts_the_model_first_and_the_baselines_beside_it():
  lines = markdown(RESULTS, about={"model": "runs/mine"}).splitlines()
  assert lines == [
    "- model: runs/mine",
    "",
    "| metric | this model | pixels | untrained |",
    "|---|---:|---:|---:|",
    "| knn/top1 | 61.2 % | 5.0 % | 9.0 % |",
    "| linear/top1 | 70.0 % | 6.0 % |  |",
    "| linear/lr | 0.002 |  |  |",
  ]


def test_the_score_of_nearest_neighbours_says_of_how_many():
  text = markdown({"knn/k10/top1": 0.5, "knn/k20/top1": 0.4, "knn/top1": 0.5})
  assert "| knn/top1 (k=10) | 50.0 % |" in text and "| knn/k20/top1 | 40.0 % |" in text


def test_terminal_table_shows_the_same():
  out = io.StringIO()
  Console(file=out, width=80).print(rich_table(RESULTS, title="runs/mine"))
  text = out.getvalue()
  for word in ("runs/mine", "this model", "61.2 %", "70.0 %", "0.002", "untrained", "5.0 %"):
    assert word in text


def test_files_hold_every_number(tmp_path):
  about = {"train": "embedded:textures"}
  save(tmp_path / "new/folder/scores.json", RESULTS, about=about)
  save(tmp_path / "scores.md", RESULTS, about=about)
  assert json.loads((tmp_path / "new/folder/scores.json").read_text()) == {"about": about, "results": RESULTS}
  assert (tmp_path / "scores.md").read_text() == markdown(RESULTS, about=about)


def test_other_kinds_of_files_are_refused(tmp_path):
  with pytest.raises(EvaluationError, match=r"\.json or \.md.*scores\.csv"):
    save(tmp_path / "scores.csv", RESULTS)


def test_what_has_no_score_is_written_with_the_reason(tmp_path):
  failed = {"linear": "one image only.", "baseline/pixels/linear": "one image only."}
  save(tmp_path / "scores.json", RESULTS, failed=failed)
  assert json.loads((tmp_path / "scores.json").read_text())["failed"] == failed
  save(tmp_path / "scores.md", RESULTS, failed=failed)
  assert "- not scored: linear, baseline/pixels/linear: one image only.\n" in (tmp_path / "scores.md").read_text()


def test_a_file_that_cannot_be_written_is_said_in_a_line():
  with pytest.raises(EvaluationError, match="/dev/full: the scores cannot be written there: No space left on device"):
    save("/dev/full", RESULTS)


def test_names_of_metrics_are_whole_in_a_narrow_table():
  metric = "linear/validation_top1"
  results = {metric: 0.5} | {f"baseline/{name}/{metric}": 0.5 for name in ("untrained", "pixels", "histogram")}
  out = io.StringIO()
  Console(file=out, width=60).print(rich_table(results))
  cells = [line.split("│")[1].strip() for line in out.getvalue().splitlines() if line.startswith("│")]
  assert metric in "".join(cells)
