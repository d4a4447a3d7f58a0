"""Tests of vit_jax/train/summary.py."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vit_jax.config import default
from vit_jax.train.summary import write_summary
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
