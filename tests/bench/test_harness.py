"""The framework of benchmarks: what is timed, compared and written. Figures themselves are never tested."""

import dataclasses
import json
from pathlib import Path

import pytest

from vit_jax import bench, cli
from vit_jax.bench import data
from vit_jax.bench.harness import Report, Row, Timing, alternate, repeat


class Clock:
  """Moves on by what each piece of work takes."""

  def __init__(self):
    self.now, self.calls = 0.0, []

  def __call__(self):
    return self.now

  def work(self, name, seconds):
    def do():
      self.calls.append(name)
      self.now += seconds

    return do


def test_two_things_are_timed_in_turn_after_one_call_each():
  clock = Clock()
  ours, theirs = alternate(clock.work("a", 1.0), clock.work("b", 4.0), seconds=0.0, units=10, clock=clock)
  assert clock.calls == ["a", "b"] + ["a", "b"] * 3
  assert ours.seconds == (1.0,) * 3 and theirs.seconds == (4.0,) * 3
  assert Row("x", "image", ours, "peer", theirs).ratio == 0.25
  assert repeat(clock.work("c", 2.0), seconds=0.0, clock=clock).median == 2.0


def test_a_ratio_is_that_of_equal_work():
  row = Row("x", "image", Timing((2.0, 2.0, 8.0), 10), "peer", Timing((1.0,), 1))
  assert row.ratio == pytest.approx(0.2)
  assert Row("x", "share", share=0.1).ratio is None
  assert Timing((1.0, 2.0, 3.0)).spread == pytest.approx(0.25)


def test_a_report_names_the_machine_and_is_written_whole(tmp_path):
  report = Report.of("data", [Row("x", "image", Timing((1.0,), 5), "peer", Timing((2.0,), 5), note="why")])
  report.write(tmp_path / "figures.json")
  written = json.loads((tmp_path / "figures.json").read_text())
  assert written["rows"][0]["ratio"] == 0.5
  assert written["rows"][0]["ours"]["per_second"] == 5.0
  assert written["machine"]["versions"]["jax"] and written["machine"]["cores"] >= 1 and written["machine"]["cpu"]
  text = report.rows[0].text()
  assert "ratio 0.500" in text and "peer 2.5/s" in text and "why" in text


@pytest.mark.parametrize("kind", ["Pillow", "installed"])
def test_the_reference_recipe_makes_its_ten_crops(kind):
  from vit_jax.bench import reference_recipe

  views = data.MultiCrop(jitter=1.0, blur=(1.0, 1.0, 1.0), grayscale=0.5, solarize=(0.5, 0.5, 0.5))
  recipe = reference_recipe._with_pillow(views) if kind == "Pillow" else reference_recipe.reference_recipe(views)[1]
  crops = recipe(data.Photographs().encoded[0])
  assert [tuple(crop.shape) for crop in crops] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8


def test_every_benchmark_named_exists():
  from vit_jax.commands import bench as command

  assert set(command._BENCHMARKS) == set(bench.BENCHMARKS)


def rows_of(*names):
  """Parts whose rows take no time."""
  from vit_jax.bench.harness import Part

  def measure(name):
    def rows(seconds):
      if name == "stop":
        raise KeyboardInterrupt
      yield Row(name, "image", Timing((1.0,), 5), "peer", Timing((2.0,), 5))

    return rows

  return [Part(name, f"the part {name}", measure(name)) for name in names]


def test_every_row_is_printed_and_written_when_it_is_measured(tmp_path, monkeypatch, capsys):
  file, seen = tmp_path / "new" / "figures.json", []

  def second(seconds):
    seen.append((json.loads(file.read_text())["rows"], capsys.readouterr().out))
    yield Row("b", "image", Timing((1.0,)))

  a, b = rows_of("a", "b")
  monkeypatch.setattr(data, "parts", lambda: [a, dataclasses.replace(b, measure=second)])
  report = bench.run("data", json=file, seconds=0.0)
  ((rows, out),) = seen
  assert [row["name"] for row in rows] == ["a"] and "ours 5/s" in out and "ratio 0.500" in out
  assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["a", "b"]
  assert [row.name for row in report.rows] == ["a", "b"] and list(file.parent.iterdir()) == [file]


def test_what_is_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(data, "parts", lambda: rows_of("a", "stop", "b"))
  file = tmp_path / "figures.json"
  assert cli.main(["bench", "data", f"--json={file}"]) == 130
  out, error = capsys.readouterr()
  assert "a (image)" in out and "interrupted" in error
  assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["a"]


def test_an_interrupt_before_the_first_row_leaves_an_older_file(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "parts", lambda: rows_of("stop"))
  file = tmp_path / "figures.json"
  file.write_text("older")
  assert cli.main(["bench", "data", f"--json={file}"]) == 130
  assert file.read_text() == "older"


@pytest.mark.parametrize("flags", [["--case=b,a"], ["--case=a", "--case=b"], ["--case=a, b"]])
def test_cases_are_chosen_by_name(monkeypatch, capsys, flags):
  monkeypatch.setattr(data, "parts", lambda: rows_of("a", "b", "stop"))
  assert cli.main(["bench", "data", *flags]) == 0
  out = capsys.readouterr().out
  assert out.count("ours 5/s") == 2


def test_an_unknown_case_is_refused_before_anything_is_measured(monkeypatch, capsys):
  monkeypatch.setattr(data, "parts", lambda: rows_of("host", "stop"))
  assert cli.main(["bench", "data", "--case=hst,host"]) == 2
  out, error = capsys.readouterr()
  assert not out and "--case=hst: bench data has no such case here (did you mean 'host'?); there are host" in error


def test_a_file_that_cannot_be_written_loses_no_rows(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(data, "parts", lambda: rows_of("a", "b"))
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError):
    bench.run("data", json=tmp_path / "file" / "figures.json", seconds=0.0)
  assert capsys.readouterr().out.count("ours 5/s") == 2


def test_links_and_devices_are_not_replaced(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "parts", lambda: rows_of("a", "b"))
  link, file = tmp_path / "link.json", tmp_path / "figures.json"
  link.symlink_to(file)
  bench.run("data", json=link, seconds=0.0)
  assert link.is_symlink() and len(json.loads(file.read_text())["rows"]) == 2
  assert not Report.replaces("/dev/stdout") or Path("/dev/stdout").is_file()
  assert Report.replaces(tmp_path / "none") and not Report.replaces("/dev/null")


@pytest.mark.parametrize("name", sorted(bench.BENCHMARKS))
def test_every_benchmark_lists_its_cases(name, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  assert cli.main(["bench", name, "--list"]) == 0
  lines = capsys.readouterr().out.splitlines()
  parts = bench.parts(name)
  assert len({part.name for part in parts}) == len(parts) > 0
  assert all(any(line.startswith(f"  {part.name}  ") for line in lines) for part in parts)
  assert max(map(len, lines)) <= 80


def test_a_benchmark_must_be_named(capsys):
  assert cli.main(["bench"]) == 2
  assert "name what to measure, one of attention" in capsys.readouterr().err
