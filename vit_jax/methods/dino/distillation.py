"""Distillation of a frozen teacher, larger as a rule, into one student or several at once.

DINOv3 (Siméoni et al. 2025), section 5.2: the objective of `dinov3`, with a frozen model and its own two heads in place
of the student's moving average. The student is not masked, but iBOT compares the same positions with the same weights.
Its moving average is kept, and is what is exported. Teacher and student meet only in the scores of their prototypes, so
that their widths, families and patch sizes may differ; their prototypes must be as many.

Where a patch of the student covers other pixels than one of the teacher's (another patch size; ConvNeXt with its stride
of 32), the teacher's images are resized until both have the same grid: 512 pixels of a ConvNeXt are 256 of a ViT/16,
16 x 16 patches each. Masks are on that grid.

Several students share images, crops, masks and the teacher's targets, which are computed once a step; then the students
learn one after the other, each with its own losses, optimizer and average, and each as if it were alone: the step of a
student is that of a run with this student only. All devices work for every student in turn, by the same shardings as
in any other run. The reference instead splits its GPUs among the students by hand (`ranks_range`), which is balanced
only if the split fits the students' costs, gathers the teacher's outputs and all crops over the whole job to deal them
out again, and changes the size of the groups over which each student's Sinkhorn-Knopp and KoLeo go. In turn, a student
takes its share of the time whatever its cost, nothing moves between devices, the mathematics do not depend on the
number of devices, and there is nothing to configure. The price is that a student is spread over more devices than it
needs; where that leaves too few images on each, `mesh.replica` and `mesh.data` divide the batch as usual. A barrier
after each student keeps the compiler from overlapping them, so that memory is that of the largest and not of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax.core import FrozenDict
from jaxtyping import Array, Float

from vit_jax.config.students import each_student
from vit_jax.data.views import Views
from vit_jax.methods import diagnostics
from vit_jax.methods.base import Batch, Metrics, Params, State
from vit_jax.methods.dino import dinov3, gram
from vit_jax.methods.dino.crops import flatten_crops
from vit_jax.methods.dino.networks import init_params, modules
from vit_jax.methods.dino.student import DISTILLATION, Student
from vit_jax.methods.dino.targets import Centering, TeacherOutputs, assign
from vit_jax.methods.dino.views import build_views
from vit_jax.methods.frozen_teacher import FrozenTeacher, frozen_teacher
from vit_jax.methods.init_from import Start
from vit_jax.methods.settings import build_schedules
from vit_jax.ops.resize import resize_map

__all__ = ["export", "init", "make_step", "modules", "starts", "views"]

# The fields of a state, and the parts of its `own`, that each of several students has for itself.
_EACH = ("student", "teacher", "opt_state", "counters", "model")
_EACH_OWN = (gram.TEACHER,)


def views(config: Any) -> Views:
  """Global and local crops, and block masks on the patches of the student's global ones.

  Raises:
    ValueError: naming the keys, if teacher and students do not fit together.
  """
  students = each_student(config)
  made = {name: build_views(alone, modules(alone).backbone.stride) for name, alone in students.items()}
  grids = {name: view.mask_grid for name, view in made.items()}
  if len(set(grids.values())) > 1:
    listed = ", ".join(f"{name} {grid[0]} x {grid[1]}" for name, grid in grids.items())
    raise ValueError(
      f"distillation.students: the patches of a global crop of {config.crops.global_size} pixels are {listed}: "
      "students that share crops and masks must have patches of one size. Distil the others in a run of their own."
    )
  _check(config, frozen_teacher(config))
  return next(iter(made.values()))


def init(config: Any, key: jax.Array) -> State:
  """A fresh state: random students, averages equal to them; the frozen teacher is random until its file is read.

  All students start from the same key, whatever their number, so that each starts as it would alone.
  """
  students = {name: dinov3.init(alone, key) for name, alone in each_student(config).items()}
  net = frozen_teacher(config).modules
  return _merged(students).replace(frozen=init_params(net, (key, key, key), net.backbone.stride))


def starts(config: Any) -> tuple[Start, ...]:
  """What a fresh student takes from elsewhere; several are asked one by one, each with its own config."""
  return dinov3.starts(config)


def export(state: State, student: str = "") -> tuple[Any, Params]:
  """The backbone and its averaged parameters, of the student of that name where there are several."""
  return dinov3.export(_part(state, student))


def make_step(config: Any) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """The training step of a resolved config: (state, batch) -> (state, metrics), pure, for `jax.jit`.

  The metrics of several students begin with their names: "small/loss".
  """
  net = frozen_teacher(config).modules
  students = {name: Student.of(alone, DISTILLATION) for name, alone in each_student(config).items()}
  first, centering = next(iter(students.values())), Centering.of(config)
  temperature = build_schedules(config, 1.0)["teacher_temperature"]
  keep_patches = any(student.shares_patches for student in students.values())

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    size = teacher_size(batch["global_crops"].shape[2], first.net.backbone.stride, net.backbone.stride)

    def look(part: Batch) -> TeacherOutputs:
      crops = resized(first.normalization(part)["global_crops"], size)
      return dinov3.teacher_outputs(net, state.frozen, part | {"global_crops": crops}, keep_patches=keep_patches)

    now = temperature(state.step)
    outputs = first.parts(batch).map(look, batch)
    targets = assign(outputs, now, state.own.get("centers"), chunk=first.objective.chunk)
    own = centering.moved(state.own, outputs, batch, ~targets.cls.finite())
    metrics = diagnostics.targets(targets.cls.probs()) | {"teacher_temperature": now}
    parts: dict[str, State] = {}
    for name, student in students.items():
      part, values = student.learn(_part(state, name), batch, targets)
      del values["teacher_temperature"]  # which is common
      metrics |= {f"{name}/{key}": value for key, value in values.items()} if name else values
      parts[name], targets, batch = jax.lax.optimization_barrier((part, targets, batch))
    merged = _merged(parts)
    return merged.replace(frozen=state.frozen, own=merged.own | _common(own)), metrics

  return step


def resized(crops: Float[Array, "B C H W 3"], size: int) -> Float[Array, "B C size size 3"]:
  """The crops with `size` pixels a side: bilinear, antialiased, as in the published code."""
  if crops.shape[2:4] == (size, size):
    return crops
  rows = flatten_crops(crops)  # [B * C, H, W, 3]
  rows = resize_map(rows, (size, size), method="bilinear", antialias=True)
  return rows.reshape(*crops.shape[:2], size, size, crops.shape[-1])


def teacher_size(size: int, stride: int, teacher_stride: int) -> int:
  """Pixels a side at which the frozen teacher sees a global crop of `size`: with as many patches as the student's."""
  return size // stride * teacher_stride


def _part(state: State, student: str) -> State:
  """The state of one student, as in a run of its own."""
  if not student:
    return state.replace(frozen=None)
  each = {name: getattr(state, name)[student] for name in _EACH}
  own = {name: state.own[name][student] for name in _EACH_OWN if student in state.own.get(name, {})}
  return state.replace(**each, own=_common(state.own) | own, frozen=None)


def _merged(parts: dict[str, State]) -> State:
  """The state of which these are the students' parts: `_part` undone."""
  if "" in parts:
    return parts[""]
  each: dict[str, Any] = {name: {student: getattr(part, name) for student, part in parts.items()} for name in _EACH}
  each["model"] = FrozenDict(each["model"])
  own = {
    name: {student: part.own[name] for student, part in parts.items() if name in part.own} for name in _EACH_OWN
  }
  first = next(iter(parts.values()))
  return first.replace(**each, own=_common(first.own) | {name: found for name, found in own.items() if found})


def _common(own: dict[str, Any]) -> dict[str, Any]:
  """What of a state's `own` all students share."""
  return {name: value for name, value in own.items() if name not in _EACH_OWN}


def _check(config: Any, teacher: FrozenTeacher) -> None:
  """Raises a ValueError that names the key if the teacher has other prototypes, or sees images in another way."""
  for section in ("dino", "ibot"):
    ours = config[section].prototypes
    theirs = getattr(teacher.modules, f"{section}_head").prototypes
    if ours != theirs:
      raise ValueError(
        f"{section}.prototypes={ours}: must equal the {theirs} of the frozen teacher {teacher.address}, with which "
        f"they are compared: --config.{section}.prototypes={theirs}."
      )
  for name, alone in each_student(config).items():
    channels = alone.model.in_channels
    if channels != teacher.modules.backbone.in_channels:
      raise ValueError(
        f"{f'students.{name}.' if name else ''}model.in_channels={channels}: the frozen teacher {teacher.address} has "
        f"{teacher.modules.backbone.in_channels}, and sees the same images."
      )
  for key, theirs in zip(("mean", "std"), teacher.normalization or (), strict=False):
    ours = config.augment[key]
    if tuple(ours) != tuple(theirs):
      raise ValueError(
        f"augment.{key}={tuple(ours)}: the frozen teacher {teacher.address} was trained with {tuple(theirs)}: "
        f"--config.augment.{key}={','.join(map(str, theirs))}."
      )
