"""The keys that every run has, whatever its method: length, batch, data, devices, evaluation, checkpoints, logs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vit_jax.recipe.sources import SOURCE

from vit_jax.config.keys import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, PROBABILITY, Key, Rule

_DEVICES = Rule("must be a number of devices, or -1 for all that are left", lambda v: v == -1 or v >= 1)

KEYS: dict[str, Any] = {
  "seed": Key(
    0,
    "the one seed: initialisation, data order, crops, masks, drop path",
    Rule("must be from 0 to 4294967295", lambda v: 0 <= v < 2**32),
  ),
  "duration": Key("100 epochs", "how long to train", duration="some", of_run=False),
  "epoch_steps": Key(
    None, "steps that make an epoch in durations; None: one pass over the data", AT_LEAST_1, kind=int
  ),
  "batch_size": Key(64, "images per step, over all devices and processes", AT_LEAST_1),
  "micro_batches": Key(
    1,
    "parts in which the student sees a batch, one after the other (gradient accumulation), for the memory of one part "
    "and the very same step; 1: no accumulation",
    AT_LEAST_1,
  ),
  "loss_group_size": Key(
    None,
    "images whose KoLeo neighbours, mask quota, drop-path subset and augmentation of positions are drawn together (the "
    "published code: the batch of one GPU), whatever the number of devices; None: what a device has of a micro-batch "
    "when the run begins, up to 64 images, else its largest divisor up to 64",
    AT_LEAST_1,
    kind=int,
  ),
  "compilation_cache": Key(
    None,
    'folder where compiled programs are kept for the next start; None: "compilation_cache" in the workdir (or '
    'JAX_COMPILATION_CACHE_DIR, where that is set); "off": they are not kept',
    Rule('must be a folder, or "off"', bool),
    kind=str,
  ),
  "data": {
    "source": Key(
      "embedded:textures",
      "where images come from: folder:/path | tfds:name/split | array_record:/glob | parquet:/glob | tar:/glob | "
      "embedded:name | synthetic:kind, or several with weights: 0.7 folder:/a + 0.3 tar:/b/*.tar",
      SOURCE,
    ),
    "workers": Key(
      -1,
      "decoding processes; 0: threads of this process; -1: chosen from the number of cores",
      Rule("must be a number of processes, or -1 to choose by the cores", lambda v: v >= -1),
    ),
    "augment": Key(
      "auto",
      'where crops are made: "device": in the training step, the host only decodes; "host": by the workers; "auto": on '
      "the device if that is a GPU or TPU. Both make the same crops, up to rounding, so that a run may change over",
      choices=("auto", "device", "host"),
    ),
    "canvas": Key(
      None,
      "height and width of the images that the device receives, larger ones being shrunk to fit; None: so that no crop "
      "of an image of usual shape has to be enlarged (576 x 576 for crops of 224 and 96 pixels)",
      kind=tuple,
      element=int,
      whole=Rule("must be (height, width), both at least 2 pixels", lambda v: len(v) == 2 and min(v) >= 2),
    ),
    "value_range": Key(
      None,
      "(low, high): the values that become 0 and 255 of images that do not have 8 bits, such as (0, 10000) for the "
      "reflectances of satellites; those of 8 bits stay as they are; None: 0 to 65535 for 16 bits, 0 to 1 for floats",
      kind=tuple,
      element=float,
      whole=Rule("must be (low, high) with low < high", lambda v: len(v) == 2 and v[0] < v[1]),
    ),
    "prefetch": Key(2, "batches kept ready on the device", AT_LEAST_1),
    "max_bad_fraction": Key(
      0.01,
      "share of unreadable images above which the run stops; sets below 1,000 images may have as many as one of that "
      "size, up to half of theirs",
      PROBABILITY,
    ),
    "timeout": Key(
      120.0, "seconds after which data that do not come are reported and asked for again; 0: never", NOT_NEGATIVE
    ),
    "cache_dir": Key(None, "embedded data and indices; None: $VIT_JAX_CACHE or ~/.cache/vit_jax", kind=str),
  },
  "mesh": {
    "replica": Key(1, "devices along this axis, which divides the images; -1: what is left", _DEVICES),
    "data": Key(-1, "devices along this axis, which divides the images; -1: what is left", _DEVICES),
    "fsdp": Key(
      1,
      "devices along this axis, which divides images, and parameters, teachers and optimizer state by their width; -1: "
      "what is left",
      _DEVICES,
    ),
    "tensor": Key(
      1, "devices along this axis, which divides heads, hidden channels and prototypes; -1: what is left", _DEVICES
    ),
    "zero": Key(
      3,
      "what fsdp spreads. 3: also the student's parameters, gathered layer by layer when they are used; 1: these are "
      "whole on every device, teachers and optimizer state are spread: more memory, less traffic",
      choices=(1, 3),
    ),
  },
  "evaluation": {
    "every": Key("10 %", 'steps between scores; also at step 0 and at the end; "0 steps": never', duration="any"),
    "tasks": Key(("knn",), "what is scored; needs labels", choices=("knn", "linear")),
    "train_source": Key(None, "None: the evaluation split of data.source where it has one", SOURCE, kind=str),
    "test_source": Key(None, "images that are scored; goes with train_source", SOURCE, kind=str),
    "image_size": Key(None, "side of the images; None: crops.global_size", AT_LEAST_1, kind=int),
    "batch_size": Key(64, "images at a time", AT_LEAST_1),
    "max_examples": Key(50_000, "images of each split that are used", AT_LEAST_1),
  },
  "checkpoint": {
    "every": Key("5 %", "steps between saves; also at the end, and when the run is asked to stop", duration="some"),
    "minutes": Key(None, "also when the last one is so long ago; None: by steps alone", POSITIVE, kind=float),
    "grace": Key(
      None,
      "seconds after SIGTERM when the process ends though its state is not saved: a little less than what the "
      "scheduler leaves; None: it ends when the state is saved",
      POSITIVE,
      kind=float,
    ),
    "keep": Key(3, "newest steps kept", AT_LEAST_1),
    "keep_every": Key(None, "steps kept for ever: those at multiples of this", kind=str, duration="some"),
  },
  "log": {
    "every": Key(10, "steps between lines of metrics", AT_LEAST_1),
    "tensorboard": Key(True, "write TensorBoard files as well"),
    "pictures": Key(True, "write pictures of crops and features"),
  },
}


def check(config: Any) -> Iterator[str]:
  """What is wrong with the mesh."""
  axes = {axis: size for axis, size in config.mesh.items() if axis != "zero"}
  if list(axes.values()).count(-1) > 1:
    yield f"mesh={axes}: at most one axis may be -1"
  sharded = {axis: axes[axis] for axis in ("replica", "data", "fsdp") if axes[axis] != -1}
  devices = 1
  for size in sharded.values():
    devices *= size
  if config.batch_size % devices:
    product = " x ".join(f"mesh.{axis}={size}" for axis, size in sharded.items())
    yield f"batch_size={config.batch_size}: must be a multiple of {product} = {devices}, over which it is divided"
