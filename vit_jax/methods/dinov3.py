"""DINOv3 training: DINO on class tokens, iBOT on masked patches, KoLeo, Gram anchoring, with an EMA teacher.

Siméoni et al. 2025 (arXiv 2508.10104); without Gram anchoring the objective is DINOv2's (Oquab et al. 2023). One step,
in order: teacher targets, student on all crops, losses, gradients, clipping per sub-module, AdamW, EMA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax import losses
from vit_jax.data.views import Views
from vit_jax.methods import gram, health, prototypes
from vit_jax.methods.accumulation import MicroBatches
from vit_jax.methods.settings import build_backbone, build_schedules, build_views, num_steps
from vit_jax.methods.starting import Start
from vit_jax.methods.state import State
from vit_jax.methods.targets import Targets, TeacherOutputs, assign, fresh_centers, moved_centers
from vit_jax.models import Features, ProjectionHead, VisionTransformer
from vit_jax.models.features import Draws
from vit_jax.ops.images import normalize_images
from vit_jax.optim import ema, optimizer
from vit_jax.optim.schedules import scale_lr

Batch = dict[str, jax.Array]
Params = dict[str, Any]
Metrics = dict[str, jax.Array]
NUM_GLOBAL = 2


class Modules(NamedTuple):
  """The modules whose parameters a student or a teacher is made of."""

  backbone: VisionTransformer
  dino_head: ProjectionHead
  ibot_head: ProjectionHead


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
      init_std=values.init_std,
      dtype=config.model.dtype,
    )

  return Modules(backbone=build_backbone(config), dino_head=head(config.dino), ibot_head=head(config.ibot))


def init(config: Any, key: jax.Array) -> State:
  """A fresh state: random student, teacher equal to it, zero moments."""
  net = modules(config)
  keys = jax.random.split(key, 4)
  image = jnp.zeros((1, config.crops.global_size, config.crops.global_size, net.backbone.in_channels))
  token = jnp.zeros((1, net.backbone.width))
  student = {
    "backbone": net.backbone.init(keys[0], image)["params"],
    "dino_head": net.dino_head.init(keys[1], token)["params"],
    "ibot_head": net.ibot_head.init(keys[2], token)["params"],
  }
  gram_teacher, gram_counters = gram.init(config, student["backbone"])
  return State(
    step=jnp.zeros((), jnp.int32),
    student=student,
    teacher=jax.tree.map(jnp.copy, student),
    gram_teacher=gram_teacher,
    opt_state=optimizer.adam(config.optim.b1, config.optim.b2, config.optim.eps).init(student),
    key=keys[3],
    counters={"nonfinite": jnp.zeros((), jnp.int32)} | gram_counters,
    model=net.backbone,
    centers=fresh_centers(config),
  )


def starts(config: Any) -> tuple[Start, ...]:
  """What a fresh state takes from elsewhere: the gram teacher of `gram.source`, all else of `init_from`."""
  places = {name: [("student", name), ("teacher", name)] for name in Modules._fields}
  found = []
  if gram.has_own_teacher(config):
    if config.gram.source in (None, "init"):
      places["backbone"].append(("gram_teacher",))
    else:
      found.append(Start("gram.source", config.gram.source, {"backbone": (("gram_teacher",),)}))
  if config.init_from is not None:
    found.insert(0, Start("init_from", config.init_from, {name: tuple(where) for name, where in places.items()}))
  return tuple(found)


def export(state: State) -> tuple[VisionTransformer, Params]:
  """The backbone and its teacher parameters: what evaluation and users of the features want."""
  return state.model, state.teacher["backbone"]


def make_step(config: Any) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """The training step of a resolved config: (state, batch) -> (state, metrics), pure, for `jax.jit`."""
  net, learn = modules(config), make_learner(config)
  temperature = build_schedules(config, 1.0)["teacher_temperature"]

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    with jax.named_scope("teacher"):
      outputs = micro_batches(config, batch).map(
        lambda part: teacher_outputs(config, net, state.teacher, part, keep_patches=gram.is_shared(config)), batch
      )
      targets = assign(outputs, temperature(state.step), state.centers, chunk=config.losses.chunk)
    state, metrics = learn(state, batch, targets)
    with jax.named_scope("centers"):
      state = state.replace(centers=moved_centers(config, state.centers, outputs, batch, metrics["nonfinite"] > 0))
    with jax.named_scope("health"):
      metrics |= (
        health.targets(targets.cls.probs()) | health.features(outputs.features) | health.means(outputs.similarity)
      )
    return state, metrics

  return step


def make_learner(config: Any, *, distilling: bool = False) -> Callable[[State, Batch, Targets], tuple[State, Metrics]]:
  """What a student does with its targets: losses, gradients, clipping, AdamW, EMA.

  Args:
    config: resolved.
    distilling: the targets are those of a frozen teacher: the student's crops are not masked (iBOT is at the masked
      positions either way), and the health of its own features is among the metrics.

  Returns:
    (state, batch, targets) -> (state, metrics).
  """
  net = modules(config)
  schedules = build_schedules(config, scale_lr(config.batch_size, config.optim.lr_scaling))
  frozen_steps = num_steps(config.optim.freeze_last_layer)
  warmup_steps = num_steps(config.init.freeze_backbone_steps)
  if not gram.enabled(config):
    del schedules["gram_loss_weight"]

  def learn(state: State, batch: Batch, targets: Targets) -> tuple[State, Metrics]:
    now = {name: schedule(state.step) for name, schedule in schedules.items()}
    state = gram.load(config, state)
    if gram.enabled(config):
      now["gram_loss_weight"] *= gram.loaded(config, state)
    draws = draw(net, state.student, batch, jax.random.fold_in(state.key, state.step))
    shared = not distilling or config.gram.source == "teacher"  # the targets' teacher is that of Gram anchoring

    def local(student: Params, part: Any) -> tuple[jax.Array, Metrics, Array]:
      rows, batch, draws = part
      with jax.named_scope("gram_teacher"):
        given = rows.anchor if shared else None
        anchor = gram.features(config, net.backbone, state, normalized(config, batch), given)
      with jax.named_scope("student"):
        weights = now["local_loss_weight"], now.get("gram_loss_weight")
        own = rows.shared_with(targets)._replace(anchor=anchor)
        return student_loss(config, net, student, own, batch, draws, *weights, masked=not distilling)

    def first_pass(student: Params, part: Any) -> Array:
      with jax.named_scope("student"):
        return global_cls(config, net, student, *part, masked=not distilling)

    def across(cls: Array) -> tuple[jax.Array, Metrics]:
      with jax.named_scope("koleo"):
        return spread_loss(config, cls)

    loss, terms, cls, grads = micro_batches(config, batch).value_and_grad(
      local,
      across,
      state.student,
      (targets.rows(), batch, draws),
      first_pass=first_pass if couples_groups(config) else None,
    )
    words = "losses are computed in float32, in float64 where the inputs are"
    chex.assert_type(loss, jnp.promote_types(loss.dtype, jnp.float32), custom_message=words)
    with jax.named_scope("optimizer"):
      grads, norms = optimizer.clip(grads, config.optim.clip)
      student, opt_state = optimizer.adamw_update(
        state.student,
        grads,
        state.opt_state,
        optimizer.groups(
          state.student,
          layerwise_decay=config.optim.layerwise_decay,
          patch_embed_lr=config.optim.patch_embed_lr,
          decay_downsample_norms=config.optim.decay_downsample_norms,
        ),
        lr=now["lr"],
        last_layer_lr=jnp.where(state.step < frozen_steps, 0.0, now["lr"]),
        weight_decay=now["weight_decay"],
        b1=config.optim.b1,
        b2=config.optim.b2,
        eps=config.optim.eps,
      )
      if warmup_steps:
        student = hold_backbone(state.step < warmup_steps, student, state.student)
      teacher = ema.update(state.teacher, student, now["momentum"])
      if warmup_steps:
        teacher = hold_backbone(state.step < warmup_steps, teacher, state.teacher)

    chex.assert_trees_all_equal_shapes_and_dtypes(
      (student, teacher, opt_state), (state.student, state.teacher, state.opt_state),
      custom_message="a step keeps the shapes and types of its state",
    )  # fmt: skip
    finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    nonfinite = jnp.where(finite, 0, state.counters["nonfinite"] + 1)
    with jax.named_scope("optimizer"):
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
    state = gram.refresh(config, state)
    terms = gram.logged(config, state, terms)
    values = {"loss": loss, **terms, **now, **{f"grad_norm/{name}": norm for name, norm in norms.items()}}
    own = health.features(cls) if distilling else {}
    return state, values | own | {"nonfinite": nonfinite}

  return learn


def micro_batches(config: Any, batch: Batch) -> MicroBatches:
  """How a batch is cut for gradient accumulation."""
  return MicroBatches(config.micro_batches, groups=batch["mask_indices"].shape[0])


def normalized(config: Any, batch: Batch) -> Batch:
  """The batch with its crops normalised once, wherever they came from as uint8."""
  mean, std = config.augment.mean, config.augment.std
  kinds = ("global_crops", "local_crops", "gram_crops")
  return batch | {name: normalize_images(batch[name], mean, std) for name in kinds if name in batch}


def hold_backbone(frozen: jax.Array, new: Params, old: Params) -> Params:
  """`new`, with the backbone of `old` while it is `frozen`: a head warm-up.

  Nothing else is held: Adam's moments of the backbone go on, as they do for frozen prototypes, so that its first own
  step is as well scaled as any other.
  """
  backbone = jax.tree.map(lambda n, o: jnp.where(frozen, o, n), new["backbone"], old["backbone"])
  return new | {"backbone": backbone}


def teacher_outputs(
  config: Any, net: Modules, teacher: Params, batch: Batch, *, keep_patches: bool = False
) -> TeacherOutputs:
  """Teacher logits of class tokens and masked patches of the global crops; `keep_patches`: also the anchor."""
  crops = flatten_crops(normalized(config, batch)["global_crops"])  # [2B, H, W, 3]
  features = net.backbone.apply({"params": teacher["backbone"]}, crops)
  cls = scores(net, teacher, "dino_head", features.cls)  # [2B, K]
  masked = gather_masked(features.patches, batch["mask_indices"])  # [groups * M, D]
  patches = scores(net, teacher, "ibot_head", masked)  # [groups * M, K]
  similarity = health.similarity(features.cls, features.patches)
  anchor = features.patches if keep_patches else None
  return TeacherOutputs(cls=cls, patches=patches, features=features.cls, similarity=similarity, anchor=anchor)


def scores(net: Modules, params: Params, head: str, tokens: Float[Array, "R D"]) -> Float[Array, "R K"]:
  """Prototype scores of tokens by one of the heads."""
  with jax.named_scope(head):
    return getattr(net, head).apply({"params": params[head]}, tokens)


@jax.named_scope("draws")
def draw(net: Modules, student: Params, batch: Batch, key: jax.Array) -> list[Draws]:
  """The random choices of the student's pass over the global and the local crops of a batch."""
  drop_path_key, rope_key = jax.random.split(key)
  rows = [batch[name].shape[0] * batch[name].shape[1] for name in ("global_crops", "local_crops")]
  return net.backbone.apply(
    {"params": student["backbone"]},
    rows,
    groups=batch["mask_indices"].shape[0],
    rngs={"drop_path": drop_path_key, "rope": rope_key},
    method="draw",
  )


def student_features(
  net: Modules, student: Params, batch: Batch, draws: list[Draws], names: tuple[str, ...], *, masked: bool
) -> list[Features]:
  """Features of the crops with these names, in one pass; global crops carry the iBOT masks where `masked`.

  Args:
    batch: normalised.
    draws: for global and local crops.
  """
  masks = batch["masks"].reshape(-1, batch["masks"].shape[-1])  # [2B, N]
  return net.backbone.apply(
    {"params": student["backbone"]},
    [flatten_crops(batch[name]) for name in names],
    masks=[masks if masked and name == "global_crops" else None for name in names],
    train=True,
    groups=batch["mask_indices"].shape[0],
    draws=draws[: len(names)],
  )


def student_loss(
  config: Any,
  net: Modules,
  student: Params,
  targets: Targets,
  batch: Batch,
  draws: list[Draws],
  local_loss_weight: jax.Array,
  gram_loss_weight: jax.Array | None = None,
  *,
  masked: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array], Array]:
  """The weighted sum of the losses that are means over images, and these unweighted by name (reference section 3.7).

  Args:
    batch: one micro-batch, or the whole batch; `targets` and `draws` are those of its images.

  Returns:
    The sum, the terms (and metrics of health), and the class tokens of the global crops [2B, D], for `spread_loss`.
  """
  batch, images = normalized(config, batch), batch["global_crops"].shape[0]
  names = ("global_crops", "local_crops")
  global_features, local_features = student_features(net, student, batch, draws, names, masked=masked)
  hidden = gather_masked(global_features.patches, batch["mask_indices"])  # [groups * M, D]
  with jax.named_scope("dino_head"):
    tokens = [split_crops(features.cls, images) for features in (global_features, local_features)]
    total, terms = prototypes.dino(
      config, net.dino_head, student["dino_head"], *tokens, targets.cls, local_loss_weight=local_loss_weight
    )
  with jax.named_scope("ibot_head"):
    patches_total, more = prototypes.ibot(
      config,
      net.ibot_head,
      student["ibot_head"],
      hidden,
      targets.patches,
      batch["mask_weights"],
      num_crops=NUM_GLOBAL * images,
    )
  total, terms = total + patches_total, terms | more
  if gram.enabled(config):
    with jax.named_scope("gram"):
      terms |= gram.terms(config, global_features.patches, targets.anchor, batch)
    total += gram_loss_weight * terms["gram"]
  if not masked:
    terms |= health.means(health.similarity(global_features.cls, global_features.patches))
  return total, terms, global_features.cls


def spread_loss(config: Any, cls: Float[Array, "R D"]) -> tuple[jax.Array, dict[str, jax.Array]]:
  """KoLeo of the class tokens of the global crops, weighted, and unweighted by name."""
  if not config.koleo.loss_weight:
    return jnp.zeros(()), {}
  koleo = grouped_koleo(cls, config.koleo.group_size, config.koleo.topk)
  return config.koleo.loss_weight * NUM_GLOBAL * koleo, {"koleo": koleo}


def couples_groups(config: Any) -> bool:
  """Whether `spread_loss` takes neighbours from several loss groups: then it needs the whole batch at once."""
  return bool(config.koleo.loss_weight) and config.koleo.group_size > config.loss_group_size


def global_cls(
  config: Any,
  net: Modules,
  student: Params,
  targets: Targets,
  batch: Batch,
  draws: list[Draws],
  *,
  masked: bool = True,
) -> Float[Array, "R D"]:
  """The class tokens that `student_loss` returns for the same arguments, without the rest of it."""
  return student_features(net, student, normalized(config, batch), draws, ("global_crops",), masked=masked)[0].cls


def flatten_crops(crops: Float[Array, "B C H W 3"]) -> Float[Array, "BC H W 3"]:
  """Images leading, crops second, as rows: sharding the rows never separates an image from its crops."""
  return crops.reshape(-1, *crops.shape[2:])


def split_crops(rows: Float[Array, "BC D"], images: int) -> Float[Array, "B C D"]:
  """Rows of `flatten_crops` order as images x crops."""
  return rows.reshape(images, -1, rows.shape[-1])


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
