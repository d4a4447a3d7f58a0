"""`vit-jax bench data`: how many images a second reach the model, and what that costs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from vit_jax.bench.harness import Part, Row, Timing, alternate, repeat
from vit_jax.bench.reference_recipe import reference_recipe
from vit_jax.data.groups import LossGroups
from vit_jax.data.sources import open_source
from vit_jax.data.subsets import keep
from vit_jax.data.views import MultiCrop, on_one_device

WIDTH, HEIGHT, QUALITY = 500, 375, 90
IMAGES = 32  # in one repetition
BATCHES = {"cpu": 8, "gpu": 256, "tpu": 256}  # images that the device augments at once
QUICKSTART_STEPS = 60
_QUICKSTART = """
from vit_jax import config
from vit_jax.train import loop
import sys
loop.train(config.load(sys.argv[2], sys.argv[3:]), sys.argv[1])
"""


class Photographs:
  """JPEGs of 500 x 375 pixels."""

  num_classes = 0
  class_names = ()

  def __init__(self):
    self.encoded = [_jpeg(pixels) for pixels in _pictures()]

  def __len__(self) -> int:
    return len(self.encoded)

  def __getitem__(self, index: int) -> dict:
    return {"image": self.encoded[index], "label": -1}

  def describe(self, index: int) -> str:
    return f"photograph {index}"


def parts() -> list[Part]:
  """Decoding, the host's path, the device's augmentation, and waiting for data in a run."""
  return [
    Part("decode", "images to crops that the device makes", functools.partial(_per_core, "decode only")),
    Part("host", "images to crops that the host makes", functools.partial(_per_core, "host path")),
    Part("device", "crops on the device", _on_device),
    Part("waiting", "the share of a run's time that it waits for data", _waiting),
  ]


def _per_core(kind: str, seconds: float) -> Iterator[Row]:
  """Two rows of one core's time: beside the reference's recipe, and beside plain decoding."""
  photographs, views, raw = _photographs(), *_views()
  title, path = ("host path", views) if kind == "host path" else ("decode only (crops on the device)", raw)
  name, recipe = reference_recipe(views)
  per_core = {"clock": time.process_time, "seconds": seconds}
  ours, theirs = alternate(
    _groups(photographs, path),
    lambda: [recipe(data) for data in photographs.encoded[:4]],
    units=IMAGES,
    their_units=min(4, len(photographs)),
    **per_core,
  )
  yield Row(title, "image, one core", ours, name, theirs)
  plain = functools.partial(_plain_decode, photographs)
  ours, theirs = alternate(_groups(photographs, path), plain, units=IMAGES, their_units=len(photographs), **per_core)
  yield Row(title, "image, one core", ours, "plain Pillow decode", theirs)


@functools.cache
def _photographs() -> Photographs:
  return Photographs()


def _views() -> tuple[MultiCrop, MultiCrop]:
  """What the host makes: crops, or canvases for crops that the device makes."""
  views = MultiCrop(loss_group_size=IMAGES)
  return views, dataclasses.replace(views, canvas=views.enough_canvas)


def _groups(source: Photographs, views: MultiCrop) -> Callable[[], object]:
  """Makes loss groups as a worker does, masks and all: each call the next."""
  groups, number = LossGroups(source, views, 0, IMAGES), iter(range(1 << 30))
  return lambda: groups[next(number)]


def _plain_decode(source: Photographs) -> None:
  for data in source.encoded:
    np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB"))


def _on_device(seconds: float) -> Iterator[Row]:
  source, (_, views) = _photographs(), _views()
  images = BATCHES.get(jax.default_backend(), 256)
  group = LossGroups(source, dataclasses.replace(views, mask_grid=None), 0, images)[0]
  batch = jax.device_put({name: array for name, array in group.items() if isinstance(array, np.ndarray)})
  augment = on_one_device(views)
  timing = repeat(lambda: jax.block_until_ready(augment(batch)), units=images, seconds=seconds)
  yield Row(f"device augmentation on {jax.devices()[0].device_kind}", "image, wall", timing, note=f"batch {images}")


def _waiting(seconds: float) -> Iterator[Row]:
  """The quick start for a few steps, in a process of its own, as a user runs it."""
  flags = [f"--config.duration={QUICKSTART_STEPS} steps", "--config.evaluation.every=0 steps"]
  flags += [f"--config.checkpoint.every={QUICKSTART_STEPS} steps", "--config.log.pictures=False"]
  keep(open_source("embedded:textures?size=64"))  # made once, outside the measurement
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, "-c", _QUICKSTART, workdir, "quickstart", *flags]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    if done.returncode:
      raise RuntimeError(f"the quick start failed:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (Path(workdir) / "timing.jsonl").read_text().splitlines()]
  measured = [line for line in lines if "data_wait_share" in line][1:]  # the first began with compiling
  share = float(np.median([line["data_wait_share"] for line in measured]))
  speed = Timing(tuple(line["step_seconds"] for line in measured), 64)
  note = f"{speed.work / speed.median:.0f} images/s over {QUICKSTART_STEPS} steps"
  yield Row("data wait of the quick start", "share of time", speed, share=share, note=note)


def _pictures() -> list[np.ndarray]:
  if importlib.util.find_spec("skimage"):
    from skimage import data

    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [np.asarray(getattr(data, name)()) for name in names]
  textures = open_source("embedded:textures?size=64")
  return [np.asarray(textures[i]["image"]) for i in range(8)]


def _jpeg(pixels: np.ndarray) -> bytes:
  image = Image.fromarray(pixels).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
  file = io.BytesIO()
  image.save(file, "JPEG", quality=QUALITY)
  return file.getvalue()
