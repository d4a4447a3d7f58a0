"""Results as tables and files."""

from __future__ import annotations

import io
import json

from rich.console import Console

from vit_jax.evaluation.report import markdown, rich_table, save

RESULTS = {
  "baseline/pixels/knn/top1": 0.05,
  "knn/top1": 0.61249,
  "linear/top1": 0.7,
  "linear/lr": 0.002,
  "baseline/random_init/knn/top1": 0.09,
  "baseline/pixels/linear/top1": 0.06,
}


def test_markdown_puts_the_model_first_and_the_baselines_beside_it():
  lines = markdown(RESULTS, about={"model": "runs/mine"}).splitlines()
  assert lines == [
    "- model: runs/mine",
    "",
    "| features | knn/top1 | linear/top1 | linear/lr |",
    "|---|---:|---:|---:|",
    "| this model | 61.2 % | 70.0 % | 0.002 |",
    "| pixels, 16x16 | 5.0 % | 6.0 % |  |",
    "| same network, untrained | 9.0 % |  |  |",
  ]


def test_terminal_table_shows_the_same():
  out = io.StringIO()
  Console(file=out, width=120).print(rich_table(RESULTS, title="runs/mine"))
  text = out.getvalue()
  for word in ("runs/mine", "this model", "61.2 %", "70.0 %", "0.002", "same network, untrained", "5.0 %"):
    assert word in text


def test_files_hold_every_number(tmp_path):
  save(tmp_path / "new" / "folder", RESULTS, about={"train": "embedded:textures"})
  saved = json.loads((tmp_path / "new/folder/evaluation.json").read_text())
  assert saved == {"about": {"train": "embedded:textures"}, "results": RESULTS}
  assert "- train: embedded:textures" in (tmp_path / "new/folder/evaluation.md").read_text()
