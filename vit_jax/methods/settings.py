"""From configuration values to the objects that methods share: the backbone, views, schedules."""

from __future__ import annotations

import dataclasses
from typing import Any

from vit_jax.data.views import Views
from vit_jax.models import ConvNeXt, Rope, VisionTransformer, create_model
from vit_jax.optim.schedules import Schedule


def build_backbone(config: Any) -> VisionTransformer | ConvNeXt:
  """The model of `config.model`: the named one with the keys that are set overriding its attributes.

  Raises:
    ValueError: for an unknown name, or attributes that do not fit together.
  """
  named = create_model(config.model.name)
  given = {key: value for key, value in config.model.items() if value is not None and key not in ("name", "rope")}
  rope = {key: value for key, value in config.model.rope.items() if value is not None}
  known = type(named).__dataclass_fields__
  for key in [*given, *(["rope"] if rope else [])]:
    if key not in known:
      raise ValueError(f"model.{key}: {config.model.name} is a {type(named).__name__}, which has no such attribute.")
  if "min_period" in rope or "max_period" in rope:
    rope.setdefault("base", None)
  if rope:
    given["rope"] = dataclasses.replace(named.rope or Rope(), **rope)
  if "width" in given and "mlp_hidden" not in given:
    given["mlp_hidden"] = named.mlp_hidden * given["width"] // named.width
  if isinstance(named, ConvNeXt):
    return named.clone(**given)
  model = named.clone(**given, masking=True)  # plain ViTs have no mask token by default
  if model.width % model.num_heads or (model.rope and (model.width // model.num_heads) % 4):
    raise ValueError(
      f"model.num_heads={model.num_heads}: it must divide model.width={model.width} into heads whose width is a "
      "multiple of 4."
    )
  return model


def build_views(config: Any, stride: int) -> Views:
  """What the data must make for a method with global and local crops and masks.

  Args:
    config: the resolved config.
    stride: pixels between neighbouring patch tokens of the backbone.

  Raises:
    ValueError: naming the key, if a crop is not a whole number of patches.
  """
  crops = config.crops
  sizes = {f"crops.{key}={crops[key]}": crops[key] for key in ("global_size", "local_size", "gram_size")}
  sizes |= {f"crops.resolutions={crops.resolutions}: {size}": size for row in crops.resolutions for size in row[:3]}
  for given, size in sizes.items():
    if size is not None and size % stride:
      near = max(round(size / stride), 1) * stride
      raise ValueError(
        f"{given}: must be a multiple of {stride}, the pixels between two patch tokens of {config.model.name} (a ViT's "
        f"model.patch_size), for example {near}."
      )
  side = config.crops.global_size // stride
  photometric = {key: value for key, value in config.augment.items() if key not in ("mean", "std")}
  return Views(
    **config.crops,
    **photometric,
    stride=stride,
    mask_grid=(side, side),
    mask_probability=config.ibot.mask_probability,
    mask_ratio=config.ibot.mask_ratio,
    mask_shift=config.ibot.mask_shift,
    loss_group_size=config.loss_group_size,
  )


def num_steps(duration: str) -> int:
  """The steps of a resolved duration, "N steps".

  Raises:
    ValueError: if the duration has another unit: the config must be resolved first (vit_jax.config.resolve).
  """
  number, unit = duration.split()
  if unit != "steps":
    raise ValueError(f"{duration!r} is not resolved to steps.")
  return int(number)


def build_schedules(config: Any, lr_factor: float) -> dict[str, Schedule]:
  """The schedules of a resolved config by name; the learning rate multiplied by `lr_factor`.

  Version 1 scales its peak only, version 2 peak and end (reference section 5.3).
  """
  total, version = num_steps(config.duration), config.schedules.version
  schedules = {}
  for name, values in config.schedules.items():
    if name == "version":
      continue
    warmup = num_steps(values.warmup)
    cosine = total - warmup if values.cosine is None else num_steps(values.cosine)
    start, peak, end = values.start, values.peak, values.end
    if name == "lr":
      peak, end = peak * lr_factor, end * (lr_factor if version == 2 else 1.0)
    schedules[name] = Schedule(start, peak, end, warmup, cosine, version=version)
  return schedules
