"""What a compiled training step will need of the hardware, and how long it may take at best: the report of a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from vit_jax.inspect.chips import Chip, Topology
from vit_jax.inspect.collectives import Collective
from vit_jax.inspect.columns import align
from vit_jax.inspect.tables import flops

_GIB = 2**30
_STATE = {  # fields of a State by what they are to a user
  "student": "parameters",
  "opt_state": "optimizer",
  "teacher": "teachers",
  "own": "teachers",  # what a method keeps besides: a gram teacher, if it is large
  "frozen": "teachers",
}

FORMULAS = (
  ("compute", "FLOPs, the larger of model and executed / peak FLOP/s"),
  ("memory", "bytes read and written / memory bandwidth"),
  (
    "network",
    "bytes each device sends in rings: gather, scatter, all-to-all (n - 1) / n of the payload, all-reduce twice that / "
    "bandwidth of the group: GPUs of one host the links; of several the smaller of the links and the network cards of "
    "all its GPUs on a host; a whole TPU slice all links, a part of it those of one dimension",
  ),
  ("step", "between max(compute, memory, network), everything overlapping, and max(compute, memory) + network"),
  ("MFU", "model FLOPs per image x images/s / (devices x peak FLOP/s)"),
)
BOUNDS = "No program reaches the peaks of a data sheet: take these times as bounds from below."
PLAIN_ATTENTION = (
  "Attention is planned as two products with the weights between them in memory: cuDNN's kernel, which bfloat16 runs "
  "take on such a GPU, cannot be compiled without one. It keeps and moves less."
)
_PAGE = 120  # characters of a line of prose that goes nowhere in particular


@dataclass(frozen=True)
class Memory:
  """Bytes of one device.

  Attributes:
    parameters, optimizer, teachers: of the state: the student, Adam's moments, and all other parameters.
    batch: the images and masks of a step, and what else the state holds.
    temporary: activations, gradients and work space: what the compiler takes besides.
    peak: at the worst moment of a step.
  """

  parameters: int
  optimizer: int
  teachers: int
  batch: int
  temporary: int
  peak: int


@dataclass(frozen=True)
class Plan:
  """One training step on hardware that is not there. Bytes, FLOPs and seconds of one device and step.

  Attributes:
    topology: "v5p:4x4x8".
    compiler: what compiled it, for people.
    mesh: sizes of the axes.
    settings: batch_size, micro_batches, remat, crops.
    memory: what it takes; `capacity` is what a device has.
    model_flops: of one image, by formula (`inspect.cost`), without recomputation.
    step_flops: what a device really executes, with recomputation.
    traffic: bytes of its memory read and written; None where the step does not fit and was not compiled to the end.
    collectives: see `inspect.collectives`; None as `traffic`.
    compute, hbm, network: seconds; None as `traffic`.
    lower_seconds, compile_seconds, host_bytes: what planning took.
  """

  topology: str
  compiler: str
  devices: int
  mesh: dict[str, int]
  settings: dict[str, Any]
  memory: Memory
  capacity: int
  model_flops: float
  step_flops: float
  peak_flops: float
  traffic: float | None = None
  collectives: tuple[Collective, ...] | None = None
  compute: float | None = None
  hbm: float | None = None
  network: float | None = None
  lower_seconds: float = 0.0
  compile_seconds: float = 0.0
  host_bytes: int = 0

  @property
  def fits(self) -> bool:
    return self.memory.peak <= self.capacity

  @property
  def step_seconds(self) -> tuple[float, float] | None:
    """From all overlapping to no overlap of network and the rest."""
    if self.compute is None:
      return None
    busy = max(self.compute, self.hbm)
    return max(busy, self.network), busy + self.network

  @property
  def images_per_second(self) -> tuple[float, float] | None:
    return self.step_seconds and tuple(self.settings["batch_size"] / seconds for seconds in self.step_seconds)

  @property
  def mfu(self) -> tuple[float, float] | None:
    return self.images_per_second and tuple(
      self.model_flops * rate / (self.devices * self.peak_flops) for rate in self.images_per_second
    )

  def to_dict(self) -> dict[str, Any]:
    """For JSON: the fields, and what follows from them."""
    derived = ("fits", "step_seconds", "images_per_second", "mfu")
    return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> Plan:
    """Undoes `to_dict`, also after JSON."""
    own = {field.name: values[field.name] for field in dataclasses.fields(cls)}
    own["memory"] = Memory(**own["memory"])
    if own["collectives"] is not None:
      own["collectives"] = tuple(Collective(**one) for one in own["collectives"])
    return cls(**own)


def state_bytes(state: Any, batch: Any) -> dict[str, int]:
  """Bytes of one device by field of `Memory`, from shapes and shardings."""
  found = {"parameters": 0, "optimizer": 0, "teachers": 0, "batch": _bytes(batch)}
  for field in dataclasses.fields(state):
    if field.metadata.get("pytree_node", True):
      found[_STATE.get(field.name, "batch")] += _bytes(getattr(state, field.name))
  return found


def _bytes(tree: Any) -> int:
  """Bytes that one device has of arrays or shapes with shardings."""

  def one(leaf: Any) -> int:
    kind = leaf.dtype if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None
    size = kind.itemsize if kind is not None else jax.eval_shape(jax.random.key_data, leaf).size * 4
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * size

  return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def network_seconds(topology: Topology, collectives: Sequence[Collective]) -> float:
  """The time of all collectives one after the other, at the bandwidth of their groups."""
  return sum(one.wire / _bandwidth(topology, one) for one in collectives)


def _bandwidth(topology: Topology, one: Collective) -> float:
  chip = topology.chip
  if chip.dimensions:
    return chip.link if one.group == topology.devices else chip.link / chip.dimensions
  return chip.link if one.per_host == one.group else min(chip.link, chip.network * one.per_host)


def report(plan: Plan, chip: Chip, *, width: int | None = None) -> str:
  """A plan as a page of text; `width` as in `columns.align`."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
  setting = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
  memory, total = plan.memory, plan.capacity
  verdict = "fits" if plan.fits else "DOES NOT FIT"
  rows = [
    ("memory per device", "", ""),
    *(
      (f"  {label}", _size(value), f"{value / total:.1%}")
      for label, value in (
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("teachers", memory.teachers),
        ("batch", memory.batch),
        ("activations and temporaries", memory.temporary),
        ("peak", memory.peak),
        (f"of {chip.name}", total),
      )
    ),
  ]
  parts = [
    align([(f"{plan.topology}: {plan.devices} devices, {plan.compiler}",), (f"mesh {mesh}; {setting}",)], width=width),
    f"{align(rows, right=(1, 2), width=width)}\n  -> {verdict}",
    _work(plan, width),
  ]
  if plan.collectives is not None:
    parts += [_collectives(plan.collectives, width), _times(plan, chip, width)]
  else:
    parts.append("The compiler gave up for want of memory: no collectives, no times.")
  took = f"traced and lowered in {plan.lower_seconds:.0f} s, compiled in {plan.compile_seconds:.0f} s, "
  parts.append(align([(f"{took}{plan.host_bytes / _GIB:.1f} GiB of this machine's memory",)], width=width))
  return "\n\n".join(parts)


def _size(value: int) -> str:
  return f"{value / _GIB:.2f} GiB" if value >= _GIB / 100 else f"{value / 2**20:.2f} MiB"


def _giga(value: float) -> str:
  return f"{value / 1e9:,.0f}" if value >= 1e11 else f"{value / 1e9:.3g}"


def _work(plan: Plan, width: int | None) -> str:
  per_device = plan.settings["batch_size"] / plan.devices * plan.model_flops
  rows = [
    ("work per step", "", ""),
    ("  model, one image", flops(plan.model_flops), "forward and backward, by formula (vit-jax inspect model)"),
    ("  model, one device", flops(per_device), f"{plan.settings['batch_size'] / plan.devices:g} images"),
    ("  executed, one device", flops(plan.step_flops), f"{plan.step_flops / per_device:.2f} times as much, traced"),
  ]
  if plan.traffic is not None:
    rows.append(("  memory read and written", f"{_giga(plan.traffic)} GB", "operands and results of every operation"))
  return align(rows, right=(1,), width=width)


def _collectives(found: Sequence[Collective], width: int | None) -> str:
  rows = [("collectives per step", "devices", "times", "payload GB", "sent GB")]
  for one in found:
    rows.append((f"  {one.kind}", f"{one.group}", f"{one.count}", _giga(one.payload), _giga(one.wire)))
  if not found:
    rows.append(("  none", "", "", "", ""))
  return align(rows, right=(1, 2, 3, 4), width=width)


def _times(plan: Plan, chip: Chip, width: int | None) -> str:
  low, high = plan.step_seconds
  rows = [
    ("estimate (roofline)", "", ""),
    ("  compute", f"{plan.compute:.3g} s", f"at {chip.flops / 1e12:.0f} TFLOP/s bfloat16"),
    ("  memory", f"{plan.hbm:.3g} s", f"at {chip.bandwidth / 1e9:.0f} GB/s"),
    ("  network", f"{plan.network:.3g} s", f"links {chip.link / 1e9:.0f} GB/s" + _cards(chip)),
    ("  step", f"{low:.3g} s", f"to {high:.3g} s"),
    ("  images/s", *(f"{'to ' if i else ''}{rate:.0f}" for i, rate in enumerate(plan.images_per_second))),
    ("  MFU", *(f"{'to ' if i else ''}{share:.1%}" for i, share in enumerate(plan.mfu))),
  ]
  prose = [BOUNDS, *([PLAIN_ATTENTION] if chip.gpu else []), f"Figures of {chip.name}: {chip.source}."]
  formulas = align([(f"  {name:<10}", text) for name, text in FORMULAS], keep=(0,), width=width or _PAGE)
  words = align([(text,) for text in prose], width=width or _PAGE)
  return f"{align(rows, right=(1,), width=width)}\n\n{formulas}\n{words}"


def _cards(chip: Chip) -> str:
  return f", network {chip.network / 1e9:.0f} GB/s a GPU" if chip.network else ""


def frontier(plans: Sequence[Plan], *, width: int | None = None) -> str:
  """Plans as a table, the fastest first; * where none that fits is both faster and smaller."""
  fitting = [plan for plan in plans if plan.fits and plan.images_per_second]

  def best(plan: Plan) -> bool:
    rate, peak = (plan.images_per_second or (0,))[0], plan.memory.peak
    better = [p for p in fitting if p.images_per_second[0] >= rate and p.memory.peak <= peak and p is not plan]
    return plan in fitting and not any(p.images_per_second[0] > rate or p.memory.peak < peak for p in better)

  rows = [("", "batch", "remat", "mesh", "peak GiB", "of", "step s", "images/s", "MFU")]
  for plan in sorted(plans, key=lambda p: (not p.fits, -(p.images_per_second or (0,))[0], p.memory.peak)):
    known = plan.images_per_second is not None
    rows.append(
      (
        "*" if best(plan) else " " if plan.fits else "x",
        f"{plan.settings['batch_size']}",
        plan.settings["remat"],
        ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device",
        f"{plan.memory.peak / _GIB:.2f}",
        f"{plan.memory.peak / plan.capacity:.0%}",
        f"{plan.step_seconds[0]:.3g}" if known else "",
        f"{plan.images_per_second[0]:.0f}" if known else "",
        f"{plan.mfu[0]:.1%}" if known else "",
      )
    )
  largest = max((p for p in plans if p.fits), key=lambda p: p.settings["batch_size"], default=None)
  words = "nothing that was tried fits"
  if largest is not None:
    words = f"largest batch that fits: {largest.settings['batch_size']} with remat {largest.settings['remat']}"
  legend = "*: on the frontier of speed and memory; x: does not fit; times as if all transfers overlapped"
  table = align(rows, right=(1, 4, 5, 6, 7, 8), width=width)
  return f"{table}\n{align([(legend,), (words,)], width=width or _PAGE)}"
