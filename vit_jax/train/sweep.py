"""Sweeps of a plan over batch size, recomputation and mesh: what fits, and what is fastest."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax.config import loss_group_size
from vit_jax.inspect.chips import Topology
from vit_jax.inspect.errors import PlanError
from vit_jax.inspect.plan import Plan
from vit_jax.parallel import AXES, BATCH_AXES, MeshError, mesh_shape

log = logging.getLogger(__name__)

AXES_OF_SWEEP = ("batch", "remat", "mesh")
REMAT = configs.choices("model.remat")
Planner = Callable[[ConfigDict], Plan]


def sweep(config: ConfigDict, where: Topology, axes: tuple[str, ...], planner: Planner) -> list[Plan]:
  """The plans of all that is tried.

  Args:
    axes: of `AXES_OF_SWEEP`. remat: all policies; mesh: fsdp over all, hybrids, tensor parallelism; batch: up to the
      largest that fits, each guess from the memory of the plans before.
    planner: makes one plan.

  Raises:
    PlanError: for another axis.
  """
  unknown = [axis for axis in axes if axis not in AXES_OF_SWEEP]
  if unknown:
    raise PlanError(f"--sweep={','.join(axes)}: {unknown[0]!r} is none of {', '.join(AXES_OF_SWEEP)}")
  found = []
  for mesh in meshes(config, where) if "mesh" in axes else [_own_mesh(config)]:
    for remat in REMAT if "remat" in axes else [config.model.remat]:
      one = config.copy_and_resolve_references()
      one.mesh.update(mesh)
      one.model.remat = remat
      found += _batches(one, where, planner) if "batch" in axes else [_planned(one, planner)]
  return found


def meshes(config: ConfigDict, where: Topology) -> list[dict[str, int]]:
  """The config's own mesh and the usual others that the devices divide into and the batch into them."""
  host, tried = where.chip.per_host, [_own_mesh(config)]
  plain = dict.fromkeys(AXES, 1)
  tried += [plain | {"fsdp": -1}, plain | {"data": -1}, plain | {"data": -1, "fsdp": host}]
  tried += [plain | {"fsdp": -1, "tensor": tensor} for tensor in (2, host)]
  kept, seen = [], set()
  for mesh in tried:
    try:
      shape = mesh_shape(mesh, where.devices)
    except MeshError:
      continue
    if shape not in seen and _unit(config, mesh, where) is not None:
      seen.add(shape)
      kept.append(mesh)
  return kept


def _own_mesh(config: ConfigDict) -> dict[str, int]:
  return {axis: config.mesh[axis] for axis in AXES}


def _unit(config: ConfigDict, mesh: dict[str, int], where: Topology) -> int | None:
  """The smallest batch on a mesh: a loss group for each micro-batch of each device; None: more than the config's."""
  devices = _devices(mesh, where)
  unit = devices * loss_group_size(config, devices) * config.micro_batches
  return unit if config.batch_size % unit == 0 else None


def _devices(mesh: dict[str, int], where: Topology) -> int:
  """Over how many devices a mesh spreads the images of a batch."""
  shape = dict(zip(AXES, mesh_shape(mesh, where.devices), strict=True))
  return math.prod(shape[axis] for axis in BATCH_AXES)


def _batches(config: ConfigDict, where: Topology, planner: Planner) -> Iterator[Plan]:
  """Plans of several batch sizes, among them, as far as memory grows evenly, the largest that fits."""
  unit = _unit(config, _own_mesh(config), where)
  if unit is None:
    raise PlanError(
      f"--sweep: batch_size={config.batch_size} does not divide over the mesh in loss groups of "
      f"{config.loss_group_size or 'any size'}: give --config.batch_size that does, or another --config.loss_group_size"
    )
  config.loss_group_size = loss_group_size(config, _devices(_own_mesh(config), where))  # that of the batch it has now
  known: dict[int, Plan] = {}

  def at(units: int) -> Plan:
    config.batch_size = units * unit
    known[units] = _planned(config, planner)
    return known[units]

  start = config.batch_size // unit
  fits = at(start).fits
  if not fits and start == 1:
    yield from known.values()
    return
  at(2 * start if fits else max(1, start // 2))
  for _ in range(3):
    guess = _largest(known)
    if guess in known or guess < 1:
      break
    at(guess)
  yield from known.values()


def _largest(known: dict[int, Plan]) -> int:
  """The number of units at which the memory of the two plans nearest to the limit, continued evenly, is full."""
  capacity = next(iter(known.values())).capacity
  near = sorted(known, key=lambda units: abs(known[units].memory.peak - capacity))[:2]
  (low, less), (high, more) = sorted((units, known[units].memory.peak) for units in near)
  if more <= less:
    return high
  guess = int(low + (capacity - less) * (high - low) / (more - less))
  too_many = [units for units, plan in known.items() if not plan.fits]
  enough = [units for units, plan in known.items() if plan.fits]
  return max(min([guess, *(units - 1 for units in too_many)]), *enough, 0)


def _planned(config: ConfigDict, planner: Planner) -> Plan:
  plan = planner(config)
  peak, rate = plan.memory.peak / plan.capacity, plan.images_per_second
  mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
  speed = f"{rate[0]:.0f} images/s at best, " if rate else ""
  log.info(
    "batch %d, remat %s, %s: %.0f %% of the memory, %scompiled in %.0f s",
    config.batch_size,
    config.model.remat,
    mesh or "one device",
    100 * peak,
    speed,
    plan.compile_seconds,
  )
  return plan
