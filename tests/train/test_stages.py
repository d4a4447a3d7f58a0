"""All stages one after the other on photographs, as configs/stages_demo.py and the README say; takes minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax import losses
from vit_jax.data.sources import open_source
from vit_jax.ops.images import normalize_images

CONFIG = Path(__file__).parents[2] / "configs" / "stages_demo.py"


def train(workdir: Path, *argv: str, variant: str = "") -> Path:
  command = [sys.executable, "-m", "vit_jax", "train", f"--config={CONFIG}{variant}", f"--workdir={workdir}", *argv]
  subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": ""})  # on one device
  return workdir


def metric(workdir: Path, name: str) -> list[float]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [line[name] for line in lines if name in line]


def patches(path: Path, images: np.ndarray) -> jax.Array:
  """Patch features [B, N, D] of the model of a run."""
  model, params = vit_jax.load_model(str(path))
  crops = normalize_images(jnp.asarray(images), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  return model.apply({"params": params}, crops).patches


@pytest.mark.slow
def test_three_stages_and_two_students(tmp_path):
  pytest.importorskip("skimage")
  pretrained = train(tmp_path / "pretrain")
  after = f"--config.init_from={pretrained}"
  anchored = train(tmp_path / "gram", after, f"--config.gram.source={pretrained}", variant=":gram")
  plain = train(tmp_path / "plain", after, variant=":plain")

  source = open_source("embedded:photos/test?size=64")
  images = np.stack([source[i]["image"] for i in range(64)])
  teacher = patches(pretrained, images)
  distance = {path.name: float(losses.gram(patches(path, images), teacher)) for path in (anchored, plain)}
  print(f"Gram distance to the gram teacher: with the loss {distance['gram']:.5f}, without {distance['plain']:.5f}")
  assert distance["gram"] < 0.7 * distance["plain"]

  sources = (f"--config.init_from={anchored}", f"--config.gram.source={anchored}")
  adapted = train(tmp_path / "high_res", *sources, variant=":high_res")
  assert set(metric(adapted, "global_size")) == {48.0, 64.0}
  assert np.isfinite(metric(adapted, "gram")).all()

  students = train(tmp_path / "distilled", f"--config.distillation.teacher={adapted}", variant=":distill")
  for name, width in (("small", 64), ("smaller", 32)):
    assert patches(students / "students" / name, images).shape == (64, 64, width)
    total = metric(students, f"{name}/loss")
    print(f"student {name}: loss {total[0]:.3f} -> {total[-1]:.3f}")
    assert total[-1] < total[0]
