"""The framework of benchmarks: what is timed, compared and written. Figures themselves are never tested."""

import json

import pytest
import rich.console

from vit_jax import bench
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
  console = rich.console.Console(width=200, record=True)
  console.print(report.table())
  text = console.export_text()
  assert "0.500" in text and "peer" in text and "why" in text


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
