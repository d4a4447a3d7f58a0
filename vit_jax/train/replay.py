"""Makes a dumped step again and says where it leaves the finite numbers: in parameters, loss, gradient, which layer."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax import methods, parallel
from vit_jax.checkpoints import Checkpoints
from vit_jax.config import UserError
from vit_jax.data.views import Views
from vit_jax.inspect.nonfinite import Event, find_nonfinite
from vit_jax.methods import State
from vit_jax.train import frozen
from vit_jax.train.loop import abstract_state, mesh_context
from vit_jax.train.nonfinite import BATCH, CONFIG, VARIANT
from vit_jax.train.setup import Run

log = logging.getLogger(__name__)

_TERMS = ("loss", "dino_local", "dino_global", "ibot", "koleo", "gram")
_MODULES = 8  # places to list
_STACKED = ("blocks", "layers")  # scopes whose parameters have a leading layer axis


def replay(folder: str, overrides: Iterable[str] = ()) -> str:
  """Makes the step again that a run left in `folder`, and returns the findings as text.

  Args:
    folder: <workdir>/nonfinite/<step>.
    overrides: "--config.key=value": changes to try, such as --config.model.dtype=float32.

  Raises:
    UserError: if the folder holds no such step, or the changes need another state.
  """
  path = Path(folder).expanduser().absolute()
  if not path.is_dir():
    raise UserError(f"{folder}: there is no such folder; give WORKDIR/nonfinite/STEP, as the run that gave up said")
  missing = [name for name in (CONFIG, BATCH, "checkpoints") if not (path / name).exists()]
  if missing:
    raise UserError(f"{folder}: holds no step to replay: {', '.join(missing)} is missing")
  config = configs.load(str(path / CONFIG), overrides)
  configs.validate(config)
  run = _run(config)
  state = _state(run, path)
  try:
    with np.load(path / BATCH) as file:
      batch = dict(file)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f"{path / BATCH}: is damaged ({error}); let the run come to this step again") from error
  views = _views_of(run, batch)
  batch = jax.device_put(batch, parallel.batch_sharding(run.mesh))
  log.info("Compiling the step with a look at every operation …")
  with mesh_context(run.mesh):
    batch = jax.jit(lambda batch: views.on_device(batch, run.mesh, parallel.BATCH_AXES))(batch)
    (_, metrics), events = find_nonfinite(run.method.make_step(config), state, batch)
  values = {name: float(value) for name, value in jax.device_get(metrics).items()}
  broken = list(_broken_parameters(state))
  title = f"step {int(state.step) + 1}, made again on {run.mesh.size} {jax.devices()[0].device_kind}"
  return "\n".join([title, *_report(values, broken, events)])


def _run(config: ConfigDict) -> Run:
  """What there is of the run without its data, on its own mesh or, where the devices are others, on one of them."""
  method = methods.get(config.method)
  try:
    mesh = parallel.make_mesh(config.mesh)
  except parallel.MeshError:
    mesh = parallel.make_mesh({axis: 1 for axis in config.mesh}, jax.devices()[:1])
  return Run(config, method, method.views(config), source=None, evaluation_sources=None, mesh=mesh)


def _views_of(run: Run, batch: dict[str, Any]) -> Views:
  """The variant of the views that a batch is of, made on the host or on the device as its arrays show."""
  variant, shapes = int(batch.pop(VARIANT, 0)), {name: array.shape for name, array in batch.items()}
  for where in ("host", "device"):
    views = run.views.made_on(where, run.config.data.canvas).variants()[variant]
    if {name: shape for name, (shape, _) in views.arrays(run.config.batch_size).items()} == shapes:
      return views
  raise UserError(f"the batch holds {shapes}, which is not what its config describes")


def _state(run: Run, path: Path) -> State:
  abstract = abstract_state(run)
  with Checkpoints(path) as checkpoints:
    state = checkpoints.restore(abstract.saved()).state
  if abstract.frozen is not None:
    state = state.replace(frozen=frozen.params_on_devices(run, abstract.frozen))
  return state


def _broken_parameters(state: State) -> Iterator[str]:
  """Every array of the state with values that are not finite, and in which layers."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      continue
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    stacked = leaf.ndim > 0 and any(f"/{scope}/" in name for scope in _STACKED)
    counts = jnp.sum(~jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)) if stacked else None)  # [L] or []
    for layer, count in enumerate(np.atleast_1d(counts)):
      if count:
        yield f"{name}{f', layer {layer}' if stacked else ''}: {count} of {leaf.size // np.size(counts)}"


def _report(metrics: dict[str, float], broken: list[str], events: list[Event]) -> Iterator[str]:
  terms = {name: value for name, value in metrics.items() if name.rpartition("/")[-1] in _TERMS}
  norms = {name: value for name, value in metrics.items() if "grad_norm/" in name}
  yield from _section("parameters and moments that are not finite", broken or ["none"])
  yield from _section("loss terms", _marked(terms))
  yield from _section("gradient norms", _marked(norms))
  if not events:
    yield from _section("first value that is not finite", ["none: here the step is finite"])
    return
  yield from _section("first value that is not finite", [str(events[0])])
  later: dict[str, Event] = {}
  for event in events:
    later.setdefault(event.where, event)
  rest = list(later.values())[1:]
  if rest:
    more = [f"… and {len(rest) - _MODULES} places more"] if len(rest) > _MODULES else []
    yield from _section("then, in the order of the computation", [*map(str, rest[:_MODULES]), *more])


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
  yield f"\n{title}"
  yield from (f"  {line}" for line in lines)


def _marked(values: dict[str, Any]) -> list[str]:
  width = max(map(len, values), default=0)
  return [f"{name:<{width}}  {value:.6g}{'' if np.isfinite(value) else '   <--'}" for name, value in values.items()]
