"""The golden training steps as our config, state and batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import Golden
from vit_jax import config as configs
from vit_jax import weights
from vit_jax.methods.base import State
from vit_jax.methods.dino import dinov3


def build_config(settings, *, groups=1, rope_dtype="float32"):
  """Our resolved config for the reference's settings; `groups` batches of the reference side by side."""
  c = configs.default()
  s, arch, epoch = settings["student"], settings["arch"], settings["epoch_length"]
  c.batch_size = settings["batch_size"] * groups
  c.loss_group_size = settings["batch_size"]
  c.duration, c.epoch_steps = f"{settings['optim']['epochs']} epochs", epoch

  c.model.name = "vit_small"
  c.model.patch_size, c.model.width, c.model.depth = s["patch_size"], arch["embed_dim"], arch["depth"]
  c.model.num_heads, c.model.num_registers = arch["num_heads"], s["n_storage_tokens"]
  c.model.mlp = "gelu" if s["ffn_layer"] == "mlp" else "swiglu"
  hidden = int(arch["embed_dim"] * arch["ffn_ratio"])
  if c.model.mlp == "swiglu":
    align = int(s["ffn_layer"].removeprefix("swiglu") or 8)
    hidden = -(-int(hidden * 2 / 3) // align) * align
  c.model.mlp_hidden = hidden
  c.model.mask_k_bias = s["mask_k_bias"]
  c.model.norm_eps = 1e-5 if s["norm_layer"] == "layernormbf16" else 1e-6
  c.model.separate_cls_norm = s["untie_cls_and_patch_norms"]
  c.model.separate_local_cls_norm = s["untie_global_and_local_cls_norm"]
  c.model.rope.dtype = rope_dtype

  for ours, theirs in ((c.dino, settings["dino"]), (c.ibot, settings["ibot"])):
    ours.prototypes, ours.hidden = theirs["head_n_prototypes"], theirs["head_hidden_dim"]
    ours.bottleneck, ours.num_layers = theirs["head_bottleneck_dim"], theirs["head_nlayers"]
  c.koleo.loss_weight, c.koleo.topk = settings["dino"]["koleo_loss_weight"], settings["dino"]["koleo_topk"]

  names = dict(lr="lr", weight_decay="weight_decay", momentum="momentum", teacher_temperature="teacher_temp")
  for ours, theirs in names.items():
    values = settings["schedules"][theirs]
    for part in ("start", "peak", "end"):
      c.schedules[ours][part] = float(values[part])
    c.schedules[ours].warmup = f"{values['warmup_epochs']} epochs"
  c.optim.freeze_last_layer = f"{settings['schedules']['lr']['freeze_last_layer_epochs']} epochs"
  o = settings["optim"]
  c.optim.b1, c.optim.b2, c.optim.clip = o["adamw_beta1"], o["adamw_beta2"], o["clip_grad"]
  c.optim.layerwise_decay, c.optim.patch_embed_lr = o["layerwise_decay"], o["patch_embed_lr_mult"]

  if settings["gram"]["use_loss"]:
    gram = settings["gram"]
    c.gram.source = "ema" if gram["ema_teacher"] else "gram_teacher.pth"
    c.gram.per_image, c.gram.normalize, c.gram.tokens = gram["img_level"], gram["normalized"], gram["tokens_used"]
    c.gram.remove_negative = "both" if gram["remove_neg"] else None
    c.gram.resize = gram["global_teacher_resize_method"]
    c.gram.antialias = gram["global_teacher_resize_antialias"]
    c.schedules.gram_loss_weight.update({part: gram["loss_weight"] for part in ("start", "peak", "end")})

  crops = settings["crops"]
  c.crops.global_size, c.crops.local_size = crops["global_crops_size"], crops["local_crops_size"]
  c.crops.local_number = crops["local_crops_number"]
  return configs.resolve(c, num_examples=1)


def build_params(config, arrays, *, names=("backbone", "dino_head", "ibot_head")):
  """Parameters of the sub-modules `names` from the reference's names ("backbone.…", "dino_head.…", "ibot_head.…")."""
  net = dinov3.modules(config)._asdict()
  part = lambda name: {k.removeprefix(f"{name}."): v for k, v in arrays.items() if k.startswith(f"{name}.")}  # noqa: E731
  params = {name: weights.from_state_dict(part(name), net[name]) for name in names}
  return jax.tree.map(jnp.asarray, params)


def build_state(config, name) -> State:
  """The state that the golden step `name` starts from."""
  g = Golden(f"{name}_weights")
  state = jax.eval_shape(lambda key: dinov3.init(config, key), jax.random.key(0))
  gram = g.under("gram_teacher")
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (state.opt_state, state.counters))
  return state.replace(
    step=jnp.zeros((), jnp.int32),
    student=build_params(config, g.under("student")),
    teacher=build_params(config, g.under("teacher")),
    own={"gram_teacher": build_params(config, gram, names=("backbone",))["backbone"]} if gram else {},
    opt_state=zeros[0],
    counters=zeros[1],
    key=jax.random.key(0),
  )


def build_batch(config, name, *indices):
  """The golden batches with these indices as one batch, a loss group each."""
  g, parts = Golden(f"{name}_batches"), []
  size = config.loss_group_size
  for index in indices:
    b = g.under(f"batch{index}")

    def crops(key, b=b):
      array = b[f"collated_{key}_x32"].astype(np.float32) / 32  # [C * B, 3, H, W], crop-major
      return array.reshape(-1, size, *array.shape[1:]).transpose(1, 0, 3, 4, 2)  # [B, C, H, W, 3]

    masks = b["collated_masks"].reshape(2, size, -1).swapaxes(0, 1)  # [B, 2, N]
    flat = masks.reshape(2 * size, -1)
    part = {"global_crops": crops("global_crops"), "local_crops": crops("local_crops"), "masks": masks}
    part["mask_indices"] = np.flatnonzero(masks)[None].astype(np.int32)  # [1, M]
    part["mask_weights"] = np.repeat(1 / np.maximum(flat.sum(1), 1), flat.sum(1))[None].astype(np.float32)
    if "collated_gram_teacher_crops_x32" in b:
      part["gram_crops"] = crops("gram_teacher_crops")
    parts.append(part)
  return {key: jnp.asarray(np.concatenate([p[key] for p in parts])) for key in parts[0]}
