"""The best step: which it is, that it is kept, and that it is named."""

from __future__ import annotations

import math
import types

import pytest

from tests.train.test_loop import one_device, tiny  # noqa: F401  (a fixture)
from vit_jax import config as configs
from vit_jax.checkpoints import read_meta, steps
from vit_jax.evaluation.names import headline
from vit_jax.inspect.saved_steps import saved_steps_table
from vit_jax.train.best import Records
from vit_jax.train.evaluations import Evaluations
from vit_jax.train.loop import train
from vit_jax.train.summary import page


def run_of(**changes):
  config = tiny(**changes)
  return types.SimpleNamespace(config=config, evaluation_sources=("a", "b"))


def names(**changes):
  return list(Records.of(run_of(**changes))._names)


def test_what_is_kept_follows_the_tasks_unless_it_is_said():
  assert names() == ["knn/top1"]
  assert names(**{"evaluation.tasks": ("linear", "knn")}) == ["linear/top1"]
  assert names(**{"checkpoint.keep_best": "knn/k20/top1"}) == ["knn/k20/top1"]
  assert names(**{"checkpoint.keep_best": "off"}) == []


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 5)])
def test_the_first_of_the_best_counts_and_nan_and_the_untrained_model_do_not(mode, best):
  records = Records(["knn/top1"], mode)
  values = {0: 0.99 if mode == "max" else 0.01, 1: 0.3, 2: 0.6, 3: 0.6, 4: math.nan, 5: 0.2, 6: 0.2}
  taken = [step for step, value in values.items() if records.take(step, {"knn/top1": value})]
  assert records.best == {"knn/top1": {"step": best, "value": values[best]}}
  assert taken == {"max": [1, 2], "min": [1, 5]}[mode]


def test_a_run_that_kept_no_records_finds_them_among_the_steps_it_has():
  records = Records(["knn/top1"])
  lines = [{"step": step, "knn/top1": value} for step, value in ((0, 0.9), (2, 0.5), (4, 0.7), (6, 0.4), (8, 0.8))]
  records.go_on({}, lines, (2, 6, 8), 6)
  assert records.best == {"knn/top1": {"step": 2, "value": 0.5}}
  records.go_on({"knn/top1": {"step": 6, "value": 0.4}, "linear/top1": {"step": 2, "value": 1.0}}, lines, (2, 6), 6)
  assert records.best == {"knn/top1": {"step": 6, "value": 0.4}}


def test_a_score_that_no_evaluation_gives_is_named_with_those_it_gives():
  with pytest.raises(configs.ConfigError, match=r"checkpoint.keep_best='knn/top5'.*it gives knn/top1$"):
    Records(["knn/top5"]).take(1, {"knn/top1": 0.1, "baseline/pixels/knn/top1": 0.1})


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"checkpoint.keep_best": "knm/top1"}, "checkpoint.keep_best='knm/top1': must be a score .* such as knn/top1"),
    ({"checkpoint.keep_best": "linear/top1"}, "checkpoint.keep_best='linear/top1': must be a score"),
    ({"checkpoint.keep_best": "loss"}, "checkpoint.keep_best='loss': must be a score"),
    ({"checkpoint.keep_best": "knn/top1", "evaluation.every": "0 steps"}, "needs evaluations"),
    ({"checkpoint.keep_best_mode": "best"}, "checkpoint.keep_best_mode='best': must be one of max, min"),
  ],
)
def test_what_cannot_be_kept_is_said_at_once(changes, words):
  with pytest.raises(configs.ConfigError, match=words):
    configs.validate(tiny(**changes))


@pytest.mark.usefixtures("one_device")
def test_the_best_step_is_saved_where_nothing_else_would_and_outlives_the_newest(tmp_path, monkeypatch):
  scores, seen = {0: 0.9, 1: 0.2, 3: 0.7, 5: 0.6, 6: 0.5}, []

  def scored(self, state, **_):
    seen.append(int(state.step))
    return {"knn/top1": scores.get(int(state.step), 0.1), "knn/k10/top1": 0.0}

  monkeypatch.setattr(Evaluations, "scores", scored)
  changes = {"evaluation.every": "1 steps", "checkpoint.every": "6 steps", "checkpoint.keep": 1, "duration": "6 steps"}
  train(tiny(**changes), str(tmp_path))
  assert seen == list(range(7)) and steps(tmp_path) == (3, 6)
  assert read_meta(tmp_path)["best"] == {"knn/top1": {"step": 3, "value": 0.7}}
  text = page(tmp_path)
  assert "| k-NN top-1 (k = 10) | **50.0%** | 70.0% (step 3) |" in text and "`checkpoints/3`" in text
  assert "untrained network (k-NN) | 90.0%" in text
  assert text.rstrip() in (tmp_path / "summary.md").read_text().replace("![curves](summary.png)\n\n", "")
  table = saved_steps_table(tmp_path)
  (line,) = [line for line in table.splitlines() if line.startswith("checkpoints/3")]
  assert "best knn/top1 0.7000" in line
  (tmp_path / "checkpoints" / "3").rename(tmp_path / "elsewhere")
  assert "Step 3, the best by k-NN top-1 (k = 10), is not kept as a checkpoint." in page(tmp_path)
  assert "The best by knn/top1 until then, step 3 (0.7000), is not there." in saved_steps_table(tmp_path)


def test_a_headline_says_its_k():
  scores = {"knn/top1": 0.5, "knn/k20/top1": 0.4, "knn/k10/top1": 0.5, "linear/top1": 0.6, "a/knn/top1": 0.1}
  assert headline(scores) == {"knn/top1 (k=10)": 0.5, "linear/top1": 0.6, "a/knn/top1": 0.1}
