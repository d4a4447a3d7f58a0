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
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float

from vit_jax.config.students import each_student
from vit_jax.data.views import Views
from vit_jax.methods import dinov3, health
from vit_jax.methods.dinov3 import Batch, Params, modules
from vit_jax.methods.settings import build_schedules, build_views
from vit_jax.methods.starting import Start
from vit_jax.methods.state import State
from vit_jax.methods.targets import TeacherOutputs, assign, moved_centers
from vit_jax.methods.teachers import FrozenTeacher, frozen_teacher
from vit_jax.ops.resize import resize_map

# The fields of a state that each of several students has for itself.
_OWN = ("student", "teacher", "gram_teacher", "opt_state", "counters", "model")


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
  image = jnp.zeros((1, net.backbone.stride, net.backbone.stride, net.backbone.in_channels))
  token = jnp.zeros((1, net.backbone.width))
  frozen = {
    "backbone": net.backbone.init(key, image)["params"],
    "dino_head": net.dino_head.init(key, token)["params"],
    "ibot_head": net.ibot_head.init(key, token)["params"],
  }
  return _merged(students).replace(frozen=frozen)


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
  net, students = frozen_teacher(config).modules, each_student(config)
  learners = {name: dinov3.make_learner(alone, distilling=True) for name, alone in students.items()}
  stride = modules(next(iter(students.values()))).backbone.stride
  temperature = build_schedules(config, 1.0)["teacher_temperature"]
  keep_patches = any(alone.gram.source == "teacher" for alone in students.values())

  def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    size = teacher_size(batch["global_crops"].shape[2], stride, net.backbone.stride)

    def look(part: Batch) -> TeacherOutputs:
      crops = resized(dinov3.normalized(config, part)["global_crops"], size)
      seen = part | {"global_crops": crops}
      return dinov3.teacher_outputs(config, net, state.frozen, seen, keep_patches=keep_patches)

    now = temperature(state.step)
    outputs = dinov3.micro_batches(config, batch).map(look, batch)
    targets = assign(outputs, now, state.centers, chunk=config.losses.chunk)
    centers = moved_centers(config, state.centers, outputs, batch, ~targets.cls.finite())
    metrics = health.targets(targets.cls.probs()) | {"teacher_temperature": now}
    parts: dict[str, State] = {}
    for name, learn in learners.items():
      part, values = learn(_part(state, name), batch, targets)
      del values["teacher_temperature"]  # which is common
      metrics |= {f"{name}/{key}": value for key, value in values.items()} if name else values
      parts[name], targets, batch = jax.lax.optimization_barrier((part, targets, batch))
    return _merged(parts).replace(frozen=state.frozen, centers=centers), metrics

  return step


def resized(crops: Float[Array, "B C H W 3"], size: int) -> Float[Array, "B C size size 3"]:
  """The crops with `size` pixels a side: bilinear, antialiased (reference section 11.31)."""
  if crops.shape[2:4] == (size, size):
    return crops
  rows = dinov3.flatten_crops(crops)  # [B * C, H, W, 3]
  rows = resize_map(rows, (size, size), method="bilinear", antialias=True)
  return rows.reshape(*crops.shape[:2], size, size, crops.shape[-1])


def teacher_size(size: int, stride: int, teacher_stride: int) -> int:
  """Pixels a side at which the frozen teacher sees a global crop of `size`: with as many patches as the student's."""
  return size // stride * teacher_stride


def _part(state: State, student: str) -> State:
  """The state of one student, as in a run of its own."""
  own = {name: getattr(state, name) for name in _OWN}
  if student:
    own = {name: value if value is None else value[student] for name, value in own.items()}
  return state.replace(**own, frozen=None)


def _merged(parts: dict[str, State]) -> State:
  """The state of which these are the students' parts: `_part` undone."""
  if "" in parts:
    return parts[""]
  own: dict[str, Any] = {name: {student: getattr(part, name) for student, part in parts.items()} for name in _OWN}
  if all(part is None for part in own["gram_teacher"].values()):
    own["gram_teacher"] = None
  own["model"] = FrozenDict(own["model"])
  return next(iter(parts.values())).replace(**own)


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
