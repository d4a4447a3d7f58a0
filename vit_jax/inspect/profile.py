"""Where the time of a training step goes: a profiler's trace, read back and added up by the parts of the method."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from vit_jax.inspect.columns import align
from vit_jax.inspect.errors import ProfileError
from vit_jax.inspect.hlo import COLLECTIVES, Instruction, Program

COLUMNS = ("teacher", "forward", "backward", "rest")
_COLLECTIVES = "collectives"
_OTHER = "other"
# The part of the method by the name that an operation got where it was traced: scopes of `jax.named_scope`, which Flax
# opens for every module. The first that fits counts.
_PARTS = (
  (r"/(attn|attn_pool)(/|$)", "attention"),
  (r"/(blocks|layers)(/.*)?/mlp(/|$)", "feed-forward"),
  (r"/(blocks|layers)(/|$)", "norms, residuals, drop path"),
  (r"/while/body(/jit\([^)]*\))?(/[^/]*)?$", "weights and tokens between blocks"),
  (r"/targets(/|$)", "targets (Sinkhorn-Knopp)"),
  (r"/losses(/|$)|\bkoleo\b|\bgram\)*(/|$)", "losses"),
  (r"/(dino|ibot)_head(/|$)", "heads"),
  (r"/augment(/|$)", "crops"),
  (r"_tokens(/|$)|patch_embed", "patch embedding"),
  (r"_features(/|$)|_maps(/|$)|downsample", "final norms, downsampling"),
  (r"/draws(/|$)", "random draws"),
  (r"/optimizer(/|$)", "optimizer, EMA"),
  (r"/(health|centers)(/|$)", "health, centers"),
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Profile:
  """Seconds of one step.

  Attributes:
    parts: by (part of the method, one of `COLUMNS`): of all threads of a CPU added, of GPUs and TPUs of one device.
    step: from step to step, without the profiler.
    traced: the same with it.
    waiting: of that without the profiler, for data.
  """

  parts: Mapping[tuple[str, str], float]
  step: float
  traced: float
  waiting: float


def part_of(op_name: str) -> tuple[str, str]:
  """(part of the method, column) of an operation called "jit(step)/transpose(jvp(student))/…/blocks/attn/qkv/dot"."""
  part = next((part for pattern, part in _PARTS if re.search(pattern, op_name)), _OTHER)
  if re.search(r"(^|[/(])(gram_)?teacher\b", op_name):
    return part, "teacher"
  if "transpose(" in op_name or "rematted_computation" in op_name:
    return part, "backward"
  return part, "forward" if re.search(r"(^|[/(])(student|koleo)\b", op_name) else "rest"


def parts_by_operation(program: Program) -> dict[str, tuple[str, str]]:
  """The part and column of every instruction that may run by itself; a fusion is that of the operation at its end."""
  found = {}
  for name in program.times():
    for instruction in program.computations[name]:
      part, column = part_of(_op_name(program, instruction))
      moves = instruction.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES
      found[instruction.name] = (_COLLECTIVES if moves else part, column)
  return found


def _op_name(program: Program, instruction: Instruction) -> str:
  """What it is called; where the compiler made a fusion or a call without a name, as most of what is in it."""
  if own := _OP_NAME.search(instruction.rest):
    return own[1]
  called = re.search(r"\b(?:calls|to_apply)=%?([\w.\-]+)", instruction.rest)
  inner = program.computations.get(called[1], []) if called else []
  names = collections.Counter(name[1] for one in inner if (name := _OP_NAME.search(one.rest)))
  return names.most_common(1)[0][0] if names else ""


def seconds_by_part(folder: Path, programs: Iterable[Program], steps: int) -> dict[tuple[str, str], float]:
  """The time of one of `steps` steps by part and column, from the traces under a folder.

  Args:
    programs: all that may have run.

  Raises:
    ProfileError: if the traces have no operations of the programs.
  """
  parts: dict[str, tuple[str, str]] = {}
  for program in programs:
    parts |= parts_by_operation(program)
  total: collections.Counter = collections.Counter()
  for file in sorted(folder.rglob("*.xplane.pb")):
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and _operations([plane], parts)]
    for name, seconds in _operations(devices or planes, parts).items():
      total[parts[name]] += seconds / steps / max(len(devices), 1)
  if not total:
    raise ProfileError(f"{folder}: the trace has no operation of the step: open it in a viewer instead")
  return dict(total)


def _operations(planes: Iterable[Any], known: Mapping[str, Any]) -> dict[str, float]:
  """Seconds of every known operation, without those of others inside it (a loop's body), all lines added."""
  total: dict[str, float] = collections.defaultdict(float)
  for plane in planes:
    lines = list(plane.lines)
    for line in [one for one in lines if one.name == "XLA Ops"] or lines:  # a TPU's trace has the same in other forms
      for name, nanoseconds in _alone(line.events, known):
        total[name] += nanoseconds / 1e9
  return total


def _alone(events: Iterable[Any], known: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
  """(operation, time without the known operations within) of the events of one line."""
  spans = []
  for event in events:
    name = _operation(event, known)
    if name is not None:
      spans.append((event.start_ns, -event.duration_ns, name))
  open_: list[list[Any]] = []  # [end, name, time], each within the one before
  for start, minus, name in sorted(spans):
    while open_ and open_[-1][0] <= start:
      _, done, time = open_.pop()
      yield done, time
    if open_:
      open_[-1][2] += minus
    open_.append([start - minus, name, -minus])
  for _, name, time in open_:
    yield name, time


def _operation(event: Any, known: Mapping[str, Any]) -> str | None:
  """The instruction that an event is: its name on CPUs, on TPUs a line of HLO; kernels of a GPU say whose they are."""
  name = event.name.removeprefix("%").split(" = ")[0]
  if name in known:
    return name
  return next((value for key, value in event.stats if key == "hlo_op" and value in known), None)


def report(profile: Profile, *, width: int | None = None) -> str:
  """A table: parts by columns in milliseconds, and shares; `width` as in `columns.align`."""
  total = sum(profile.parts.values())
  by_part: dict[str, dict[str, float]] = collections.defaultdict(dict)
  for (part, column), seconds in profile.parts.items():
    by_part[part][column] = seconds
  used = [column for column in COLUMNS if any(column in row for row in by_part.values())]
  rows = [("ms a step", *used, "all", "share")]
  for part, row in sorted(by_part.items(), key=lambda item: -sum(item[1].values())):
    cells = (f"{1e3 * row[column]:.3g}" if column in row else "" for column in used)
    rows.append((part, *cells, f"{1e3 * sum(row.values()):.3g}", f"{sum(row.values()) / total:.1%}"))
  sums = (sum(row.get(column, 0.0) for row in by_part.values()) for column in used)
  rows.append(("all", *(f"{1e3 * one:.3g}" for one in sums), f"{1e3 * total:.3g}", "100.0%"))
  whole = (
    f"from step to step {1e3 * profile.step:.4g} ms, {1e3 * profile.waiting:.3g} of it waiting for data "
    f"({1e3 * profile.traced:.4g} ms with the profiler)"
  )
  table = align(rows, right=tuple(range(1, len(used) + 3)), width=width)
  return f"{table}\n\n{align([(whole,)], width=width)}"
