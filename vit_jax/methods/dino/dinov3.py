"""DINOv3 pretraining: a student learns to predict its own moving average, the teacher, from other views of an image.

Siméoni et al. 2025 (arXiv 2508.10104); without Gram anchoring the objective is DINOv2's (Oquab et al. 2023). One step,
in order: teacher targets, student on all crops, losses, gradients, clipping per sub-module, AdamW, EMA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.data.views import Views
from vit_jax.methods import diagnostics
from vit_jax.methods.base import Batch, Metrics, Params, State
from vit_jax.methods.dino import gram
from vit_jax.methods.dino.crops import flatten_crops, gather_masked
from vit_jax.methods.dino.networks import Modules, init_params, modules, scores
from vit_jax.methods.dino.student import SELF_DISTILLATION, Student
from vit_jax.methods.dino.targets import Centering, TeacherOutputs, assign
from vit_jax.methods.dino.views import build_views
from vit_jax.methods.init_from import Start
from vit_jax.methods.learner import fresh_moments
from vit_jax.methods.settings import build_backbone, build_schedules
from vit_jax.models import VisionTransformer

__all__ = ["export", "init", "make_step", "modules", "starts", "views"]


def views(config: Any) -> Views:
  """Global and local crops, block masks on the global ones."""
  return build_views(config, build_backbone(config).stride)


def init(config: Any, key: jax.Array) -> State:
  """A fresh state: random student, teacher equal to it, zero moments."""
  net = modules(config)
  *init_keys, key = jax.random.split(key, 4)
  student = init_params(net, init_keys, config.crops.global_size)
  gram_teacher, gram_counters = gram.init(config, student["backbone"])
  return State(
    step=jnp.zeros((), jnp.int32),
    student=student,
    teacher=jax.tree.map(jnp.copy, student),
    opt_state=fresh_moments(config, student),
    key=key,
    counters={"nonfinite": jnp.zeros((), jnp.int32)} | gram_counters,
    model=net.backbone,
    own=gram_teacher | Centering.of(config).init(),
  )


def starts(config: Any) -> tuple[Start, ...]:
  """What a fresh state takes from elsewhere: the gram teacher of `gram.source`, all else of `init_from`."""
  places = {name: [("student", name), ("teacher", name)] for name in Modules._fields}
  found = []
  if gram.has_own_teacher(config):
    if config.gram.source in (None, "init"):
      places["backbone"].append(("own", gram.TEACHER))
    else:
      found.append(Start("gram.source", config.gram.source, {"backbone": (("own", gram.TEACHER),)}))
  if config.init_from is not None:
    found.insert(0, Start("init_from", config.init_from, {name: tuple(where) for name, where in places.items()}))
  return tuple(found)


def export(state: State) -> tuple[VisionTransformer, Params]:
  """The backbone and its teacher parameters: what evaluation and users of the features want."""
  return state.model, state.teacher["backbone"]


def make_step(config: Any) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """The training step of a resolved config: (state, batch) -> (state, metrics), pure, for `jax.jit`."""
  student, centering = Student.of(config, SELF_DISTILLATION), Centering.of(config)
  temperature = build_schedules(config, 1.0)["teacher_temperature"]

  def look(teacher: Params, part: Batch) -> TeacherOutputs:
    return teacher_outputs(student.net, teacher, student.normalization(part), keep_patches=student.shares_patches)

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    with jax.named_scope("teacher"):
      outputs = student.parts(batch).map(lambda part: look(state.teacher, part), batch)
      targets = assign(
        outputs, temperature(state.step), state.own.get("centers"), chunk=student.objective.chunk
      )
    state, metrics = student.learn(state, batch, targets)
    with jax.named_scope("centers"):
      state = state.replace(own=centering.moved(state.own, outputs, batch, metrics["nonfinite"] > 0))
    with jax.named_scope("health"):
      metrics |= (
        diagnostics.targets(targets.cls.probs())
        | diagnostics.features(outputs.features)
        | diagnostics.means(outputs.similarity)
      )
    return state, metrics

  return step


def teacher_outputs(net: Modules, teacher: Params, batch: Batch, *, keep_patches: bool = False) -> TeacherOutputs:
  """Teacher logits of class tokens and masked patches of the global crops; `keep_patches`: also the anchor.

  Args:
    net: modules of the teacher.
    teacher: parameters by sub-module.
    batch: normalised.
    keep_patches: the patches will anchor the student's.
  """
  features = net.backbone.apply({"params": teacher["backbone"]}, flatten_crops(batch["global_crops"]))
  cls = scores(net, teacher, "dino_head", features.cls)  # [2B, K]
  masked = gather_masked(features.patches, batch["mask_indices"])  # [groups * M, D]
  patches = scores(net, teacher, "ibot_head", masked)  # [groups * M, K]
  similarity = diagnostics.similarity(features.cls, features.patches)
  anchor = features.patches if keep_patches else None
  return TeacherOutputs(cls=cls, patches=patches, features=features.cls, similarity=similarity, anchor=anchor)
