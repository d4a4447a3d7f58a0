"""DINOv3 pretraining, stage 1: DINO on class tokens, iBOT on masked patches, KoLeo, with an EMA teacher.

Siméoni et al. 2025 (arXiv 2508.10104); the objective is DINOv2's (Oquab et al. 2023). One step, in order: teacher
targets, student on all crops, losses, gradients, clipping per sub-module, AdamW, EMA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax import losses
from vit_jax.data.views import Views
from vit_jax.methods import health
from vit_jax.methods.settings import build_backbone, build_schedules, build_views, num_steps
from vit_jax.methods.state import State
from vit_jax.models import ProjectionHead, VisionTransformer
from vit_jax.ops.images import normalize_images
from vit_jax.optim import ema, optimizer
from vit_jax.optim.schedules import scale_lr

Batch = dict[str, jax.Array]
Params = dict[str, Any]
NUM_GLOBAL = 2


class Modules(NamedTuple):
  """The modules whose parameters a student or a teacher is made of."""

  backbone: VisionTransformer
  dino_head: ProjectionHead
  ibot_head: ProjectionHead


class Targets(NamedTuple):
  """What the teacher says about a batch.

  Attributes:
    cls: [2, B, K] assignment of the class tokens of the global crops.
    patches: [groups * M, K] assignment of the masked patches.
    features: [2B, D] the teacher's class tokens, for the health metrics.
  """

  cls: Array
  patches: Array
  features: Array


def views(config: Any) -> Views:
  """Global and local crops, block masks on the global ones."""
  return build_views(config, build_backbone(config).stride)


def modules(config: Any) -> Modules:
  """The modules of `config`, in its compute type."""

  def head(values: Any) -> ProjectionHead:
    return ProjectionHead(
      hidden=values.hidden,
      bottleneck=values.bottleneck,
      prototypes=values.prototypes,
      num_layers=values.num_layers,
      dtype=config.model.dtype,
    )

  return Modules(backbone=build_backbone(config), dino_head=head(config.dino), ibot_head=head(config.ibot))


def init(config: Any, key: jax.Array) -> State:
  """A fresh state: random student, teacher equal to it, zero moments."""
  net = modules(config)
  keys = jax.random.split(key, 4)
  image = jnp.zeros((1, config.crops.global_size, config.crops.global_size, 3))
  token = jnp.zeros((1, net.backbone.width))
  student = {
    "backbone": net.backbone.init(keys[0], image)["params"],
    "dino_head": net.dino_head.init(keys[1], token)["params"],
    "ibot_head": net.ibot_head.init(keys[2], token)["params"],
  }
  return State(
    step=jnp.zeros((), jnp.int32),
    student=student,
    teacher=jax.tree.map(jnp.copy, student),
    gram_teacher=None,
    opt_state=optimizer.adam(config.optim.b1, config.optim.b2, config.optim.eps).init(student),
    key=keys[3],
    counters={"nonfinite": jnp.zeros((), jnp.int32)},
    model=net.backbone,
  )


def export(state: State) -> tuple[VisionTransformer, Params]:
  """The backbone and its teacher parameters: what evaluation and users of the features want."""
  return state.model, state.teacher["backbone"]


def make_step(config: Any) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """The training step of a resolved config: (state, batch) -> (state, metrics), pure, for `jax.jit`."""
  net, learn = modules(config), make_learner(config)
  temperature = build_schedules(config, 1.0)["teacher_temperature"]

  def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    batch = normalized(config, batch)
    targets = teacher_targets(net, state.teacher, batch, temperature(state.step))
    state, metrics, _ = learn(state, batch, targets)
    return state, metrics | health.targets(targets.cls) | health.features(targets.features)

  return step


def make_learner(
  config: Any, *, masked: bool = True
) -> Callable[[State, Batch, Targets], tuple[State, dict[str, jax.Array], Array]]:
  """The part of a step that the targets are given to: losses, gradients, clipping, AdamW, EMA.

  Args:
    config: resolved.
    masked: whether the student sees masked global crops; iBOT is at the masked positions either way.

  Returns:
    (state, normalised batch, targets) -> (state, metrics, the student's class tokens of the global crops [2B, D]).
  """
  net = modules(config)
  schedules = build_schedules(config, scale_lr(config.batch_size, config.optim.lr_scaling))
  frozen_steps = num_steps(config.optim.freeze_last_layer)

  def learn(state: State, batch: Batch, targets: Targets) -> tuple[State, dict[str, jax.Array], Array]:
    now = {name: schedule(state.step) for name, schedule in schedules.items()}
    key = jax.random.fold_in(state.key, state.step)

    def objective(student: Params) -> tuple[jax.Array, tuple[dict[str, jax.Array], Array]]:
      return student_loss(config, net, student, targets, batch, key, now["local_loss_weight"], masked=masked)

    (loss, (terms, cls)), grads = jax.value_and_grad(objective, has_aux=True)(state.student)
    grads, norms = optimizer.clip(grads, config.optim.clip)
    student, opt_state = optimizer.adamw_update(
      state.student,
      grads,
      state.opt_state,
      optimizer.groups(
        state.student, layerwise_decay=config.optim.layerwise_decay, patch_embed_lr=config.optim.patch_embed_lr
      ),
      lr=now["lr"],
      last_layer_lr=jnp.where(state.step < frozen_steps, 0.0, now["lr"]),
      weight_decay=now["weight_decay"],
      b1=config.optim.b1,
      b2=config.optim.b2,
      eps=config.optim.eps,
    )
    teacher = ema.update(state.teacher, student, now["momentum"])

    finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    nonfinite = jnp.where(finite, 0, state.counters["nonfinite"] + 1)
    student, teacher, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (student, teacher, opt_state),
      (state.student, state.teacher, state.opt_state),
    )
    state = state.replace(
      step=state.step + 1,
      student=student,
      teacher=teacher,
      opt_state=opt_state,
      counters=state.counters | {"nonfinite": nonfinite},
    )
    grad_norms = {f"grad_norm/{name}": norm for name, norm in norms.items()}
    return state, {"loss": loss, **terms, **now, **grad_norms, "nonfinite": nonfinite}, cls

  return learn


def normalized(config: Any, batch: Batch) -> Batch:
  """The batch with its crops normalised once, wherever they came from as uint8."""
  mean, std = config.augment.mean, config.augment.std
  crops = {name: normalize_images(batch[name], mean, std) for name in ("global_crops", "local_crops")}
  return batch | crops


def teacher_targets(net: Modules, teacher: Params, batch: Batch, temperature: jax.Array) -> Targets:
  """Sinkhorn-Knopp assignments of the teacher's class tokens and masked patches, over the whole batch."""
  crops = flatten_crops(batch["global_crops"])  # [2B, H, W, 3]
  features = net.backbone.apply({"params": teacher["backbone"]}, crops)
  cls_logits = net.dino_head.apply({"params": teacher["dino_head"]}, features.cls)  # [2B, K]
  masked = gather_masked(features.patches, batch["mask_indices"])  # [groups * M, D]
  patch_logits = net.ibot_head.apply({"params": teacher["ibot_head"]}, masked)  # [groups * M, K]
  cls = split_crops(losses.sinkhorn_knopp(cls_logits, temperature), NUM_GLOBAL)  # [2, B, K]
  targets = Targets(cls=cls, patches=losses.sinkhorn_knopp(patch_logits, temperature), features=features.cls)
  return jax.lax.stop_gradient(targets)


def student_loss(
  config: Any,
  net: Modules,
  student: Params,
  targets: Targets,
  batch: Batch,
  key: jax.Array,
  local_loss_weight: jax.Array,
  *,
  masked: bool = True,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Array]]:
  """The weighted sum of the losses; the unweighted terms by name (reference section 3.7) and the class tokens."""
  num_local, groups = batch["local_crops"].shape[1], batch["mask_indices"].shape[0]
  drop_path_key, rope_key = jax.random.split(key)
  masks = batch["masks"].reshape(-1, batch["masks"].shape[-1]) if masked else None  # [2B, N]
  global_features, local_features = net.backbone.apply(
    {"params": student["backbone"]},
    [flatten_crops(batch["global_crops"]), flatten_crops(batch["local_crops"])],
    masks=[masks, None],
    train=True,
    groups=groups,
    rngs={"drop_path": drop_path_key, "rope": rope_key},
  )
  tokens = jnp.concatenate([global_features.cls, local_features.cls])  # [(2 + L) B, D]
  logits = net.dino_head.apply({"params": student["dino_head"]}, tokens)
  global_logits, local_logits = jnp.split(logits, [global_features.cls.shape[0]])
  hidden = gather_masked(global_features.patches, batch["mask_indices"])  # [groups * M, D]
  patch_logits = net.ibot_head.apply({"params": student["ibot_head"]}, hidden)  # [groups * M, K]

  ignore, num_crops = config.dino.ignore_diagonal, global_features.cls.shape[0]
  terms = {
    "dino_local": losses.dino(split_crops(local_logits, num_local), targets.cls),
    "dino_global": losses.dino(split_crops(global_logits, NUM_GLOBAL), targets.cls, ignore_diagonal=ignore),
    "ibot": losses.ibot(patch_logits, targets.patches, batch["mask_weights"].reshape(-1), num_crops=num_crops),
  }
  global_pairs = NUM_GLOBAL * (NUM_GLOBAL - 1 if ignore else NUM_GLOBAL)
  local_share = NUM_GLOBAL * num_local / (global_pairs + NUM_GLOBAL * num_local)
  total = config.dino.loss_weight * (
    local_share * local_loss_weight * terms["dino_local"] + (1 - local_share) * terms["dino_global"]
  )
  total += config.ibot.loss_weight * terms["ibot"]
  if config.koleo.loss_weight:
    terms["koleo"] = grouped_koleo(global_features.cls, config.koleo.group_size, config.koleo.topk)
    total += config.koleo.loss_weight * NUM_GLOBAL * terms["koleo"]
  return total, (terms, global_features.cls)


def flatten_crops(crops: Float[Array, "B C H W 3"]) -> Float[Array, "BC H W 3"]:
  """Images leading, crops second, as rows: sharding the rows never separates an image from its crops."""
  return crops.reshape(-1, *crops.shape[2:])


def split_crops(rows: Float[Array, "BC K"], num_crops: int) -> Float[Array, "C B K"]:
  """Rows of `flatten_crops` order as crops x images."""
  return rows.reshape(-1, num_crops, rows.shape[-1]).swapaxes(0, 1)


def gather_masked(patches: Float[Array, "R N D"], indices: Array) -> Float[Array, "M D"]:
  """The masked patches of every loss group; `indices` [groups, M] count within the group, so groups stay local."""
  groups, width = indices.shape[0], patches.shape[-1]
  grouped = patches.reshape(groups, -1, width)  # [groups, 2 g N, D]
  return jnp.take_along_axis(grouped, indices[..., None], axis=1).reshape(-1, width)


def grouped_koleo(cls: Float[Array, "R D"], group_size: int, topk: int) -> jax.Array:
  """KoLeo of each global crop within each group of `group_size` images, averaged."""
  crops = cls.reshape(-1, group_size, NUM_GLOBAL, cls.shape[-1]).swapaxes(1, 2)  # [groups, 2, g, D]
  per_crop = jax.vmap(jax.vmap(lambda x: losses.koleo(x, topk=topk)))(crops)  # [groups, 2]
  return jnp.mean(per_crop)
