"""Starting from what others trained: what a source holds, whether it fits, and which of it a fresh state takes.

A method says by `starts` which parts of its state come from a source, a `Source` says what a run or a file holds, and
`match` decides for each sub-module whether it is taken. A sub-module is taken whole or not at all.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from vit_jax import weights
from vit_jax.checkpoints import trees
from vit_jax.config.students import SECTION
from vit_jax.methods.architecture import config_keys, differences
from vit_jax.methods.settings import build_backbone, num_steps
from vit_jax.models import PositionTable, Rope
from vit_jax.weights import finite, record
from vit_jax.weights.hub_cache import locate
from vit_jax.weights.opening import Opened, holds_weights, open_weights, read_preprocessor
from vit_jax.weights.record import MODEL, PARAMS

__all__ = ["Place", "Source", "Start", "Taken", "holds_weights", "locate", "match", "not_finite", "open_file"]

Shape = tuple[int, ...]
Place = tuple[str, ...]  # names that lead to a part of the state: ("student", "backbone")

# Parameters that only training uses, so that published weights may lack them.
_TRAINING_ONLY = ("mask_token", "local_cls_norm/scale", "local_cls_norm/bias")


class Start(NamedTuple):
  """What a fresh state takes from elsewhere.

  Attributes:
    key: the config key that names the source.
    path: its value: a run, one of its steps, or weights.
    places: by sub-module, all the places of the state that get its parameters.
  """

  key: str
  path: str
  places: dict[str, tuple[Place, ...]]

  def of_student(self, student: str) -> Start:
    """The same of one of several students, whose keys and places have its name."""

    def of(field: str, *rest: str) -> Place:
      return (field, rest[0], student, *rest[1:]) if field == "own" else (field, student, *rest)

    places = {name: tuple(of(*place) for place in found) for name, found in self.places.items()}
    return Start(f"{SECTION}.{student}.{self.key}", self.path, places)


class Source(NamedTuple):
  """A run or a weight file, opened.

  Attributes:
    name: for people.
    model: its backbone.
    parts: the shapes of its parameters by path, by sub-module ("backbone", "dino_head", …).
    read: (sub-module, (path, shape) -> sharding) -> its parameters as a tree.
    unfit: why a sub-module that it holds is not among the parts.
    normalization: mean and standard deviation of the images it was trained with; None: unknown.
    nonfinite: (sub-module, (index, count)) -> the names of its tensors, in this one of so many shares of them, that
      hold NaN or infinity, as far as that can be known before they are on the devices.
  """

  name: str
  model: nn.Module
  parts: dict[str, dict[str, Shape]]
  read: Callable[[str, Callable[[str, Shape], jax.sharding.Sharding]], dict[str, Any]]
  unfit: dict[str, str]
  normalization: tuple[tuple[float, ...], tuple[float, ...]] | None
  nonfinite: Callable[[str, tuple[int, int]], list[str]] = lambda part, share: []


class Taken(NamedTuple):
  """What becomes of a sub-module.

  Attributes:
    name: the sub-module.
    paths: its parameters that come from the source; none: it stays as it was initialised.
    fresh: parameters that are not in the source, and why.
    why: for people: why it stays fresh.
  """

  name: str
  paths: tuple[str, ...]
  fresh: tuple[str, ...] = ()
  why: str = ""


def open_file(path: pathlib.Path, wanted: Mapping[str, nn.Module]) -> Source:
  """Weights of whatever kind as a source.

  What leaves no trace in a file (the epsilon of the norms, often the number of heads) is taken to be as in `wanted`.

  Args:
    path: the file.
    wanted: the modules by sub-module that will get the parameters.

  Raises:
    WeightsError, WeightMismatch: if it cannot be read or is not complete in itself.
  """
  if (path / MODEL).exists():
    return _open_export(path)
  opened = _open_as(path, getattr(wanted["backbone"], "position_table", None))
  modules = {name: module for name, module in wanted.items() if name in opened.tensors}
  modules["backbone"] = _assume(opened, wanted["backbone"])
  layouts = {"backbone": opened.backbone.layout}
  parts, unfit = {}, {}
  for name, module in modules.items():
    try:
      parts[name] = weights.parameter_shapes(opened.tensors[name], module, layouts.get(name, "dinov3"))
    except weights.WeightMismatch as error:
      if name == "backbone":
        raise
      unfit[name] = "; ".join(line.strip() for line in str(error).splitlines()[1:])

  def read(name: str, sharding: Callable[[str, Shape], jax.sharding.Sharding]) -> dict[str, Any]:
    tensors, layout = opened.tensors[name], layouts.get(name, "dinov3")
    return weights.from_state_dict(tensors, modules[name], layout, sharding=sharding)

  def nonfinite(name: str, share: tuple[int, int]) -> list[str]:
    return finite.nonfinite(opened.tensors[name], share)

  return Source(str(path), modules["backbone"], parts, read, unfit, opened.normalization, nonfinite)


def _open_export(path: pathlib.Path) -> Source:
  """A folder of format "orbax"."""
  module, attributes = record.read_own(path / MODEL)
  model, shapes, text = module(**attributes), trees.shapes(path / PARAMS), (path / MODEL).read_text()
  record.check_shapes(path / MODEL, model, shapes)

  def read(name: str, sharding: Callable[[str, Shape], jax.sharding.Sharding]) -> dict[str, Any]:
    return trees.read_tree(path / PARAMS, sharding, text)

  def nonfinite(name: str, share: tuple[int, int]) -> list[str]:
    return finite.nonfinite(flatten_dict(trees.read_tree(path / PARAMS, text=text), sep="/"), share)

  said = read_preprocessor(path)
  return Source(str(path), model, {"backbone": shapes}, read, {}, None if said is None else said[:2], nonfinite)


def _open_as(path: pathlib.Path, table: PositionTable | None) -> Opened:
  """A file whose learned positions, where it does not say of which grid they are, are those that are wanted."""
  try:
    return open_weights(path)
  except weights.WeightsError:
    if table is None or table.kind != "learned":
      raise
    return open_weights(path, given=table.grid)


def _assume(opened: Opened, wanted: nn.Module) -> nn.Module:
  """The backbone of a file, with what the file does not say as it is wanted, where that is possible."""
  found = opened.backbone
  model = found.module(**found.attributes)
  if not isinstance(wanted, found.module):
    return model
  for name in found.assumed:
    attribute, _, inner = name.partition(".")
    ours, theirs = getattr(wanted, attribute), getattr(model, attribute)
    if inner and isinstance(ours, Rope) and isinstance(theirs, Rope):
      model = model.clone(**{attribute: dataclasses.replace(theirs, **{inner: getattr(ours, inner)})})
    elif not inner and _possible(attribute, ours, model):
      model = model.clone(**{attribute: ours})
  return model


def _possible(attribute: str, value: Any, model: nn.Module) -> bool:
  """Whether a file with the tensors of `model` may have been saved from one with this attribute."""
  if attribute == "num_heads":
    return model.width % value == 0
  if attribute == "rope":
    return value is not None
  if attribute == "position_table":
    return value is not None and model.position_table is not None and _same_rows(value, model.position_table)
  return True


def _same_rows(one: PositionTable, other: PositionTable) -> bool:
  """Whether two tables have the same parameters; how they are resized has none."""
  return (one.kind, one.grid, one.prefix) == (other.kind, other.grid, other.prefix)


def match(
  start: Start, source: Source, config: Any, abstract: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
) -> tuple[list[Taken], list[str]]:
  """What is taken of each sub-module, and what people should know about it.

  Args:
    start: what is asked for.
    source: what there is.
    config: of this run.
    abstract: the parameters that are to be filled, by sub-module and path.

  Raises:
    ValueError: if the backbone is another one: all that is different, and the config keys that would fit.
  """
  taken, notes = [], []
  for name, leaves in abstract.items():
    wanted = {path: leaf.shape for path, leaf in leaves.items()}
    if name not in source.parts:
      reason = f"no {name} in {source.name}"
      if name in source.unfit:
        reason = f"the {name} of {source.name} is another: {source.unfit[name]}"
      taken.append(Taken(name, (), why=reason))
      continue
    different = _shape_differences(source.parts[name], wanted)
    if name == "backbone":
      attributes, minor = differences(source.model, build_backbone(config))
      if attributes or different:
        raise ValueError(_misfit(start, source, config, [*attributes, *different]))
      notes += [
        f"{start.key}={start.path}: {line}, and here it stays" for line in minor + _normalization(source, config)
      ]
    elif different:
      taken.append(Taken(name, (), why=f"the {name} of {source.name} is another: {'; '.join(different)}"))
      continue
    there = tuple(path for path in wanted if path in source.parts[name])
    taken.append(Taken(name, there, fresh=tuple(path for path in wanted if path not in there)))
  if any(not part.paths for part in taken) and not num_steps(config.init.freeze_backbone_steps):
    notes.append("Heads start at random under a trained backbone: init.freeze_backbone_steps lets them learn first.")
  return taken, notes


def not_finite(names: Sequence[str]) -> str:
  """What to say of a source whose tensors of these names hold NaN or infinity."""
  return f"there is {finite.named(names)}: nothing can be trained from that; take weights that are whole"


def _normalization(source: Source, config: Any) -> list[str]:
  here = tuple(config.augment.mean), tuple(config.augment.std)
  if source.normalization in (None, here):
    return []
  there = tuple(tuple(values) for values in source.normalization)
  return [f"augment.mean and augment.std: {there} there, {here} here"] if there != here else []


def _shape_differences(there: Mapping[str, Shape], here: Mapping[str, Shape]) -> list[str]:
  lines = [f"{path}: {list(there[path])} there, none here" for path in there if path not in here]
  for path, shape in here.items():
    if path not in there and path not in _TRAINING_ONLY:
      lines.append(f"{path}: none there, {list(shape)} here")
    elif path in there and there[path] != shape:
      lines.append(f"{path}: {list(there[path])} there, {list(shape)} here")
  return lines


def _misfit(start: Start, source: Source, config: Any, lines: list[str]) -> str:
  listed = "\n".join(f"  {line}" for line in lines)
  keys, beyond = config_keys(source.model, config)
  fit = f"The config that fits: {' '.join(f'--config.{key}={value}' for key, value in keys.items())}"
  if beyond:
    fit = f"No config reaches {', '.join(beyond)} of that model. {fit if keys else ''}".rstrip()
  return f"{start.key}={start.path!r}: holds another backbone than config.model describes:\n{listed}\n{fit}"
