"""Starting a run from other runs and from weight files: opened and checked before anything is written or compiled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from vit_jax import checkpoints, methods
from vit_jax import config as configs
from vit_jax.checkpoints.tree import Placement
from vit_jax.config import ConfigError
from vit_jax.config.students import config_at
from vit_jax.inspect.columns import align
from vit_jax.methods import State
from vit_jax.methods.init_from import Place, Source, Start, Taken, holds_weights, locate, match, not_finite, open_file
from vit_jax.train.setup import Run

log = logging.getLogger(__name__)


class Opened(NamedTuple):
  """A source that was asked for, and what is taken of it."""

  start: Start
  source: Source
  taken: list[Taken]
  notes: list[str]


def open_sources(run: Run, abstract: State) -> list[Opened]:
  """The sources of the run's parameters, opened and matched with the state.

  Args:
    run: the run.
    abstract: its state: shapes, types and shardings.

  Raises:
    ConfigError: naming the key, if there is no such source, or it holds another architecture.
  """
  opened = []
  students = methods.each_student(run.config)
  asked = [(start, name) for name, alone in students.items() for start in run.method.starts(alone)]
  for start, student in asked:
    start = start.of_student(student) if student else start
    try:
      source = _open(start, run.method.modules(students[student])._asdict())
      leaves = {name: _leaves(abstract, places[0]) for name, places in start.places.items()}
      taken, notes = match(start, source, students[student], leaves)
      _check_finite(source, taken)
      opened.append(Opened(start, source, taken, notes))
    except (ValueError, OSError, RuntimeError) as error:
      text = str(error)
      named = text.startswith(f"{start.key}=")
      raise ConfigError(text if named else f"{start.key}={start.path!r}: {text}") from error
  return opened


def _check_finite(source: Source, taken: list[Taken]) -> None:
  """Raises a ValueError that names the tensors that are NaN or infinite; each process reads its share of them."""
  share = jax.process_index(), jax.process_count()
  bad = [name for part in taken if part.paths for name in source.nonfinite(part.name, share)]
  bad = bad if share[1] == 1 else _of_everyone(bad)
  if bad:
    raise ValueError(not_finite(bad))


def _of_everyone(names: list[str], most: int = 1000) -> list[str]:
  """The names that all processes have, as far as `most` bytes of each hold them."""
  text = np.frombuffer("\n".join(names).encode()[:most].ljust(most, b"\0"), np.uint8)
  texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(text)]
  return [name for found in texts if found for name in found.split("\n")]


def begin(state: State, opened: list[Opened]) -> State:
  """The fresh state with the parameters of the sources in their places; a place that is named again gets the later.

  Raises:
    ConfigError: if some are NaN or infinite; names them.
  """
  for start, source, taken, _ in opened:
    for part in taken:
      if part.paths:
        state = _fill(state, start, source, part)
  return state


def report(opened: list[Opened], *, width: int | None = None) -> str:
  """What comes from where, as a table: sub-module, tensors, origin; `width` as in `inspect.columns.align`."""
  if not opened:
    return "Starting from scratch."
  rows = [("parameters", "tensors", "from")]
  for start, source, taken, _ in opened:
    for part in taken:
      name = _name(start.places[part.name], part.name)
      if part.paths:
        rows.append((name, str(len(part.paths)), source.name))
      else:
        rows.append((name, "all", f"fresh: {part.why}"))
      rows += [(f"  {path}", "1", f"fresh: not in {source.name}, only used in training") for path in part.fresh]
  notes = [(note,) for found in opened for note in found.notes]
  lines = [align(rows, right=(1,), width=width), *([align(notes, width=width)] if notes else [])]
  return "\n".join(lines)


def _name(places: tuple[Place, ...], sub_module: str) -> str:
  """ "backbone (student, teacher)"; of several students "backbone (student/small, teacher/small)"."""
  named = ("/".join(place).removeprefix("own/").removesuffix(f"/{sub_module}") for place in places)
  return f"{sub_module} ({', '.join(named)})"


def _open(start: Start, wanted: Mapping[str, Any]) -> Source:
  path = locate(start.path)
  address = checkpoints.find(path)
  if address is not None:
    return _open_run(address)
  if not path.exists() and not holds_weights(path):
    raise FileNotFoundError(
      f"there is nothing: give a run (a folder with {checkpoints.FOLDER}/), one of its steps "
      f"(RUN/{checkpoints.FOLDER}/STEP), a .pth or safetensors file, or a folder of Hugging Face or of "
      "torch.distributed.checkpoint"
    )
  return open_file(path, wanted)


def _open_run(address: checkpoints.Address) -> Source:
  """The teacher of a run, at a step."""
  meta = checkpoints.read_meta(address.workdir, step=address.step)
  step, config = meta["step"], config_at(configs.from_dict(meta["config"]), address)
  root = f"{'/'.join(address.place)}/"
  parts: dict[str, dict[str, tuple[int, ...]]] = {}
  for name, entry in meta["manifest"].items():
    if name.startswith(root):
      part, _, path = name.removeprefix(root).partition("/")
      parts.setdefault(part, {})[path] = tuple(entry["shape"])

  def read(part: str, sharding: Placement) -> dict[str, Any]:
    return checkpoints.restore_params(address.workdir, (*address.place, part), step, sharding)

  normalization = tuple(config.augment.mean), tuple(config.augment.std)
  student = f", student {address.student}" if address.student else ""
  return Source(f"{address.workdir}, step {step}{student}", methods.backbone(config), parts, read, {}, normalization)


def _leaves(state: State, place: Place) -> dict[str, Any]:
  """The parameters at a place of the state by path."""
  return flatten_dict(functools.reduce(lambda tree, name: tree[name], place[1:], getattr(state, place[0])), sep="/")


def _fill(state: State, start: Start, source: Source, part: Taken) -> State:
  places = start.places[part.name]
  leaves = _leaves(state, places[0])
  read = flatten_dict(source.read(part.name, lambda path, _: leaves[path].sharding), sep="/")
  whole = jax.device_get(_are_finite([read[path] for path in part.paths]))  # those of a run are seen here first
  bad = [f"{part.name}/{path}" for path, fine in zip(part.paths, whole, strict=True) if not fine]
  if bad:
    raise ConfigError(f"{start.key}={start.path!r}: {not_finite(bad)}")
  found = unflatten_dict(leaves | {path: read[path].astype(leaves[path].dtype) for path in part.paths}, sep="/")
  for i, place in enumerate(places):
    copy = found if i == 0 else jax.jit(functools.partial(jax.tree.map, jax.numpy.copy))(found)
    state = _replaced(state, place, copy)
  return state


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays])


def _replaced(state: State, place: Place, value: Any) -> State:
  """The state with `value` at a place."""

  def put(tree: Any, names: Place) -> Any:
    return tree | {names[0]: put(tree[names[0]], names[1:])} if names else value

  return state.replace(**{place[0]: put(getattr(state, place[0]), place[1:])})
