"""Tables in the width of a terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vit_jax import cli
from vit_jax.inspect.columns import align, terminal_width

ROOT = Path(__file__).parents[2]


def letters(text: str) -> Counter:
  """What a text says, whatever its spaces and lines."""
  return Counter("".join(text.split()))


def test_without_a_width_columns_are_as_wide_as_their_cells():
  assert align([("a", "1", "x"), ("bcd", "22", "")], right=(1,)) == "a     1  x\nbcd  22"


def test_a_cell_that_is_too_long_has_its_line_and_the_rest_comes_below_at_its_place():
  rows = [("name", "size", "on"), ("a/long/path/of/a/parameter", "12 x 384 x 1152", "fsdp")]
  first, second, third = align(rows, keep=(1, 2), width=40).splitlines()
  assert second == "a/long/path/of/a/parameter"
  assert third.index("12 x 384") == first.index("size") and third.index("fsdp") == first.index("on")
  assert len(third) <= 40


def test_words_of_the_last_column_are_wrapped_where_it_begins():
  text = align([("key", "some words that go on for longer than the line has room")], width=40)
  assert text.splitlines() == ["key  some words that go on for longer", "     than the line has room"]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_nothing_is_lost_and_no_line_is_longer(width):
  rows = [
    ("", "parameters", "1,234,567", "a note of several words that needs more than one line of a narrow terminal"),
    ("*", "data.source", "2", "'folder:/" + "x" * 150 + "'"),
    ("", "schedules.teacher_temperature.warmup", "3", ""),
    ("", "", "", ""),
    ("a heading that has no other cells and is longer than the column", "", "", ""),
  ]
  narrow = align(rows, right=(2,), keep=(0,), width=width)
  assert letters(narrow) == letters(align(rows, right=(2,)))
  assert max(map(len, narrow.splitlines())) <= max(width, 63)  # 63: the heading is in a column that keeps its width
  narrow = align(rows, right=(2,), width=width)
  assert max(map(len, narrow.splitlines())) <= width and letters(narrow) == letters(align(rows, right=(2,)))


@pytest.mark.parametrize(
  "command",
  [
    "data list",
    "inspect config --config=quickstart",
    "inspect config --config=dinov3/stages:b_high_res",
    "inspect model --config=tiny",
    "inspect model --config=dinov3/stages:s_high_res",
    "inspect sharding --config=tiny",
    "inspect sharding --config=dinov3/vit7b16_pretrain --devices=256",
    "inspect sharding --config=dinov3_vits16 --devices=8 --config.mesh.fsdp=4 --config.mesh.tensor=2 "
    "--config.mesh.data=1 --config.mesh.zero=1",
  ],
)
def test_tables_fit_a_terminal_of_80_columns_and_say_all(command, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  texts = {}
  for columns in ("80", None):
    monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
    assert cli.main(command.split()) == 0
    texts[columns] = capsys.readouterr().out
  assert max(map(len, texts["80"].splitlines())) <= 80
  assert letters(texts["80"]) == letters(texts[None])
  assert Counter(texts["80"].split()) == Counter(texts[None].split())  # no word is broken


def test_a_file_has_long_lines_whatever_the_terminal(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "60")
  assert terminal_width() == 60
  path = tmp_path / "t.txt"
  assert cli.main(["inspect", "model", "--config=dinov3/stages:s_high_res", f"--output={path}"]) == 0
  assert max(map(len, path.read_text().splitlines())) > 80
