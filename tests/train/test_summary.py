"""Tests of vit_jax/train/summary.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vit_jax import config as configs
from vit_jax.checkpoints import NotSaved
from vit_jax.config import default
from vit_jax.train.interrupts import Stopped
from vit_jax.train.summary import page, write_summary
from vit_jax.train.writers import Writers


def test_the_page_states_the_run(tmp_path):
  (tmp_path / "config.json").write_text(default().to_json())
  with Writers(tmp_path, tensorboard=False) as writers:
    for step in range(0, 101, 10):
      if step:
        writers.scalars(step, {"loss": 30.0 - step / 10, "teacher_entropy": 8.0, "feature_rank": 5.0 + step})
        writers.timing(step, {"images_per_second": 100.0, "step_seconds": 0.64})
      if step % 50 == 0:
        writers.scalars(step, {"knn/top1": 0.1 + step / 400})
    writers.scalars(0, {"baseline/pixels/knn/top1": 0.0512})
  page = write_summary(tmp_path, baselines={"colours": 0.2}, alarms=["step 3: something"]).read_text()
  assert "dinov3 · dinov3_vits16 · embedded:textures · batch 64 · 100 epochs · seed 0" in page
  assert "last recorded step: 100" in page and "training time: 1 min 4 s, median 100 images/s" in page
  assert "| k-NN top-1 | **35.0%** | 35.0% (step 100) |" in page
  for baseline in ("| pixels (k-NN) | 5.1% |", "| colours (k-NN) | 20.0% |", "| untrained network (k-NN) | 10.0% |"):
    assert baseline in page
  assert "| total loss | `loss` | 29 | 20 |" in page
  assert "- step 3: something" in page and "`metrics.jsonl`" in page and "(summary.png)" in page
  picture = np.asarray(Image.open(tmp_path / "summary.png"))
  assert picture.shape[1] == 3 * 520 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_an_empty_run_has_a_page_too(tmp_path):
  assert write_summary(tmp_path).read_text().startswith(f"# {tmp_path.name}")
  assert (tmp_path / "summary.png").exists()


def test_a_run_full_of_nan_has_a_page_too(tmp_path):
  with Writers(tmp_path, tensorboard=False) as writers:
    for step in range(5):
      writers.scalars(step, {"loss": float("nan"), "feature_rank": float("nan"), "knn/top1": float("nan")})
  assert "nan" in write_summary(tmp_path).read_text()


def begun(folder, steps=100, **changes):
  """A run of so many steps that has its config."""
  config = default()
  config.duration = f"{steps} steps"
  config.update_from_flattened_dict(changes)
  configs.save(config, folder / "config.json")
  return Writers(folder, tensorboard=False)


def test_the_page_names_what_was_changed_of_the_named_model(tmp_path):
  changes = {"model.depth": 3, "model.rope.base": 50.0, "model.dtype": "bfloat16", "model.remat": "dots"}
  begun(tmp_path, **changes).close()
  assert "dinov3 · dinov3_vits16 with depth=3, rope.base=50.0 · " in page(tmp_path)
  begun(tmp_path).close()
  assert "dinov3 · dinov3_vits16 · " in page(tmp_path)


@pytest.mark.parametrize(
  ("values", "reached", "said"),
  [
    ([0.001, 0.3, 0.5, 0.01, 0.002], 100, "**Collapsed**"),
    ([0.001, 0.3, 0.5, 0.01, 0.002], 30, "**Collapsed**"),
    ([0.001, 0.001, 0.002], 60, "**Not learned**"),
    ([0.001, 0.001, 0.002], 40, None),  # features spread slowly
    ([0.001, 0.3, 0.5, 0.6], 100, None),
    ([], 100, None),
  ],
)
def test_a_collapsed_run_says_so(tmp_path, values, reached, said):
  with begun(tmp_path) as writers:
    for i, value in enumerate(values):
      writers.scalars(reached * (i + 1) // len(values), {"feature_std": value})
  text = page(tmp_path)
  assert [word for word in ("**Collapsed**", "**Not learned**") if word in text] == ([said] if said else [])
  assert said is None or "`feature_std` 0.002" in text


def test_the_page_says_why_the_run_ended(tmp_path):
  begun(tmp_path).close()
  assert "**Ended by an error**: of this" in write_summary(tmp_path, ended=ValueError("of\nthis")).read_text()
  assert "Stopped on request" in write_summary(tmp_path, ended=Stopped(15, 3)).read_text()


def test_a_page_of_damaged_files_names_them_and_has_the_rest(tmp_path, caplog):
  with begun(tmp_path) as writers:
    for step in range(1, 5):
      writers.scalars(step, {"loss": 1.0 * step})
  path = tmp_path / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  lines[1] = '{"step": 2, "loss": ' + "[" * 100_000 + "\n"
  lines[2] = '{"step": 3, "loss": "much"}\n'
  path.write_text("".join(lines) + '{"st')
  before = path.read_bytes()
  for name in ("config.json", "goodput.json"):
    (tmp_path / name).write_text("{" * 100_000)
  text = page(tmp_path)
  assert "| total loss | `loss` | 1 | 4 |" in text and path.read_bytes() == before
  assert f"{path}, line 2: is nested too deeply" in caplog.text
  assert f"{path}, line 3: has no number for 'loss'" in caplog.text
  for name in ("config.json", "goodput.json"):
    assert f"{tmp_path / name}, line 1: is no JSON" in caplog.text


@pytest.mark.parametrize("wrong", [{"model": 1}, {"data": {}}, {"checkpoint": []}, {"model": {"name": 5}}])
def test_a_config_of_other_kinds_of_values_is_damaged(tmp_path, caplog, wrong):
  begun(tmp_path).close()
  path = tmp_path / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
  assert "dinov3_vits16" not in page(tmp_path)
  assert f"{path}: is no config of a run" in caplog.text


@pytest.mark.parametrize(("wanted", "mode", "step"), [("knn/k20/top1", "max", 2), ("knn/top1", "min", 4)])
def test_the_page_names_the_step_that_is_kept_as_the_best(tmp_path, wanted, mode, step):
  changes = {"checkpoint.keep_best": wanted, "checkpoint.keep_best_mode": mode}
  with begun(tmp_path, **changes) as writers:
    for at, k10, k20 in ((0, 0.1, 0.1), (2, 0.3, 0.9), (4, 0.2, 0.3), (6, 0.4, 0.5)):
      writers.scalars(at, {"knn/top1": k10, "knn/k10/top1": k10, "knn/k20/top1": k20})
  (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
  text = page(tmp_path)
  assert f"Step {step}, the best by " in text and f": `checkpoints/{step}`." in text
  assert f"(step {step}) |" in text


def test_where_no_run_is_there_is_no_page(tmp_path):
  with pytest.raises(NotSaved, match="no run is there"):
    page(tmp_path / "none")
