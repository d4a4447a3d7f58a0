"""Plain-text tables: a configuration with what was changed, a model with its parameters, tokens and operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_jax.inspect.columns import align
from vit_jax.inspect.cost import Size, StepCost, abstract_params, count, dino_step, head_flops, parameter_count
from vit_jax.models import ProjectionHead, VisionTransformer


def config_table(config: Mapping[str, Any], default: Mapping[str, Any], *, width: int | None = None) -> str:
  """Every key of a configuration on a line; keys that differ from the default are marked * and show it.

  Args:
    config: nested, such as a ConfigDict.
    default: the schema to compare with; keys that it lacks count as changed.
    width: as in `columns.align`.
  """
  changed, rows = _changed(config, default), []
  for key, value in flatten(config).items():
    rows.append(("*" if key in changed else " ", key, _show(value), changed.get(key, "")))
  return align(rows, keep=(0, 1), width=width)


def changes_table(
  config: Mapping[str, Any], default: Mapping[str, Any], *, was: str = "default ", width: int | None = None
) -> str:
  """The keys that differ, with their values and, behind `was`, those of the default; empty if none does."""
  changed, values = _changed(config, default, was), flatten(config)
  rows = [(f"  {key}", _show(values[key]), before) for key, before in changed.items()]
  return align(rows, keep=(0,), width=width) if rows else ""


def _changed(config: Mapping[str, Any], default: Mapping[str, Any], was: str = "default ") -> dict[str, str]:
  """What the keys that differ were."""
  values, defaults = flatten(config), flatten(default)
  return {
    key: "new key" if key not in defaults else f"{was}{_show(defaults[key])}"
    for key, value in values.items()
    if key not in defaults or not _same(value, defaults[key])
  }


def model_table(
  model: VisionTransformer,
  *,
  image_sizes: Iterable[tuple[str, Size]],
  heads: Mapping[str, ProjectionHead] | None = None,
  steps: Iterable[tuple[str, StepCost]] = (),
  width: int | None = None,
) -> str:
  """A model in numbers: parameters by part, then tokens and operations by image size, then the training step.

  Args:
    model: the backbone.
    image_sizes: (name, pixels), as in [("global crop", 224), ("local crop", 96)].
    heads: projection heads by name.
    steps: (name, cost) of training steps, see `cost.dino_step`.
    width: as in `columns.align`.
  """
  params = abstract_params(model)
  rows = [("parameters", "", "")]
  tokens = [name for name in ("cls_token", "registers", "mask_token") if name in params]
  rows.append(("  tokens", f"{sum(params[name].size for name in tokens):,}", ", ".join(tokens)))
  for name in sorted(set(params) - set(tokens), key=lambda name: (name != "patch_embed", name)):
    total = parameter_count(params[name])
    note = f"{model.depth} x {total // model.depth:,}" if name == "blocks" else ""
    rows.append((f"  {name}", f"{total:,}", note))
  rows.append(("  backbone, all", f"{parameter_count(params):,}", ""))
  for name, head in (heads or {}).items():
    rows.append(
      (f"  {name}", f"{parameter_count(abstract_params(head, width=model.width)):,}", _head_shape(model, head))
    )
  for name, size in image_sizes:
    cost = count(model, size)
    pixels = (size, size) if isinstance(size, int) else size
    extra = f"{cost.grid[0]} x {cost.grid[1]} patches + class token + {model.num_registers} registers"
    rows += [("", "", ""), (f"{name}, {pixels[0]} x {pixels[1]} pixels", "", "")]
    rows.append(("  tokens", f"{cost.tokens:,}", extra))
    rows += [(f"  {part}", flops(value), f"{value / cost.flops:.0%}") for part, value in cost.parts.items()]
    rows.append(("  forward pass of one image", flops(cost.flops), ""))
  for name, head in (heads or {}).items():
    rows += [("", "", ""), (f"{name}, one row", flops(head_flops(head, model.width)), "")]
  for name, step in steps:
    rows += [("", "", ""), (name, "", "")]
    rows += [(f"  {part}", flops(value), f"{value / step.flops:.0%}") for part, value in step.parts.items()]
    rows.append(("  all", flops(step.flops), "matrix products, without recomputation"))
  return align(rows, right=(1,), width=width)


def training_table(
  modules: Any,
  views: Any,
  *,
  masked: Sequence[float],
  own_teacher: bool = True,
  gram_teacher: bool | None = None,
  width: int | None = None,
) -> str:
  """`model_table` of what a method with DINO and iBOT heads trains, at every resolution of its crops.

  Args:
    modules: backbone, dino_head and ibot_head, as `methods.dinov3.modules(config)` makes them.
    views: the crops, as `methods.dinov3.views(config)` describes them.
    masked: masked patches per image, both global crops together, for each of `views.variants()`.
    own_teacher: whether the teacher is the model's own average.
    gram_teacher: whether a gram teacher has a pass of its own; None: if there are gram crops.
    width: as in `columns.align`.
  """
  variants = views.variants()
  sizes = [("global crop", v.global_size) for v in variants]
  if views.local_number:
    sizes += [("local crop", v.local_size) for v in variants]
  sizes += [("gram crop", v.gram_size) for v in variants if v.gram_size is not None]
  costs = [
    dino_step(
      *modules,
      global_size=v.global_size,
      local_size=v.local_size,
      local_number=v.local_number,
      gram_size=v.gram_size,
      masked=count,
      own_teacher=own_teacher,
      gram_teacher=gram_teacher,
    )
    for v, count in zip(variants, masked, strict=True)
  ]
  heads = {"dino_head": modules.dino_head, "ibot_head": modules.ibot_head}
  unique = list(dict.fromkeys(sizes))
  if len(variants) == 1:
    return model_table(
      modules.backbone, image_sizes=unique, heads=heads, steps=[("training step, per image", costs[0])], width=width
    )
  total = sum(size.probability for size in views.resolutions)
  shares = [size.probability / total for size in views.resolutions]
  steps = [
    (f"training step at {v.name} ({share:.1%} of the steps), per image", cost)
    for v, share, cost in zip(variants, shares, costs, strict=True)
  ]
  table = model_table(modules.backbone, image_sizes=unique, heads=heads, steps=steps, width=width)
  mean = sum(share * cost.flops for share, cost in zip(shares, costs, strict=True))
  return f"{table}\n\ntraining step, mean of the {len(variants)} resolutions, per image: {flops(mean)}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested keys joined by dots, in their order."""
  flat = {}
  for key, value in tree.items():
    if hasattr(value, "items"):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def flops(value: float) -> str:
  """Operations for people: 4.63 GFLOP."""
  for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= size:
      return f"{value / size:.3g} {unit}FLOP"
  return f"{value:.3g} FLOP"


def _head_shape(model: VisionTransformer, head: ProjectionHead) -> str:
  sizes = [model.width] + [head.hidden] * (head.num_layers - 1) + [head.bottleneck, head.prototypes]
  return " -> ".join(map(str, sizes))


def _same(a: Any, b: Any) -> bool:
  if isinstance(a, list | tuple) and isinstance(b, list | tuple):
    return list(a) == list(b)
  return a == b and isinstance(a, bool) == isinstance(b, bool)  # True == 1 in Python


def _show(value: Any) -> str:
  return str(tuple(value)) if isinstance(value, list) else repr(value)
