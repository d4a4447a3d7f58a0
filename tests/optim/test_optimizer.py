"""Parameter groups name by name, AdamW, and clipping."""

from __future__ import annotations

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.golden import FOLDER
from vit_jax import weights
from vit_jax.models import ConvNeXt, ProjectionHead, create_model
from vit_jax.optim import ema, optimizer

MODULES = {
  "vit_small_default": dict(model="vit_small", dino=(2048, 256, 65536), ibot=(2048, 256, 65536)),
  "vit_7b_pretrain": dict(model="dinov3_vit7b16", dino=(8192, 512, 262144), ibot=(4096, 384, 98304)),
}


def state_dict_of(tree, module, shapes):
  """A number per parameter (or per layer) as the reference's names: broadcast, converted, read at one element."""
  full = jax.tree.map(lambda value, s: np.broadcast_to(np.float64(value), s), tree, shapes)
  return {name: float(np.ravel(array)[0]) for name, array in weights.to_state_dict(full, module).items()}


@pytest.mark.parametrize("case", sorted(MODULES))
def test_groups_equal_the_reference_name_by_name(case):
  golden, names = json.loads((FOLDER / f"param_groups_{case}.json").read_text()), MODULES[case]
  # The multipliers depend on depth and names alone: narrow modules are enough.
  backbone = create_model(names["model"], width=16, num_heads=2, mlp_hidden=16, patch_size=2)
  modules = {"backbone": backbone, "dino_head": ProjectionHead(8, 4, 6), "ibot_head": ProjectionHead(8, 4, 6)}
  inputs = {"backbone": jnp.zeros((1, 4, 4, 3)), "dino_head": jnp.zeros((1, 16)), "ibot_head": jnp.zeros((1, 16))}
  params = {
    name: jax.eval_shape(module.init, jax.random.key(0), inputs[name])["params"] for name, module in modules.items()
  }
  groups = optimizer.groups(
    params, layerwise_decay=golden["layerwise_decay"], patch_embed_lr=golden["patch_embed_lr_mult"]
  )
  shapes = jax.tree.map(lambda leaf: leaf.shape, params)
  ours = {}
  for name, module in modules.items():
    values = [state_dict_of(getattr(groups, field)[name], module, shapes[name]) for field in optimizer.Groups._fields]
    ours |= {(name, key): tuple(v[key] for v in values) for key in values[0]}
  assert len(golden["groups"]) > 50
  for entry in golden["groups"]:
    lr, decay, last = ours[(entry["module"], entry["name"])]
    assert lr == pytest.approx(entry["lr_multiplier"], rel=1e-12), entry["name"]
    assert decay == entry["wd_multiplier"], entry["name"]
    assert bool(last) == entry["is_last_layer"], entry["name"]


@pytest.mark.parametrize("as_published", [False, True])
def test_groups_of_a_convnext_decay_the_four_norms_that_the_reference_misses_if_asked_to(as_published):
  """Section 5.2: no decay of what ends with bias or is called norm or gamma; all learning rates alike."""
  model = ConvNeXt(depths=(1, 1, 2, 1), widths=(8, 16, 16, 24))
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  groups = optimizer.groups(
    {"backbone": params}, layerwise_decay=0.9, patch_embed_lr=0.2, decay_downsample_norms=as_published
  )
  shapes = jax.tree.map(lambda leaf: leaf.shape, params)
  assert set(jax.tree.leaves(groups.lr)) == {1.0} and not any(jax.tree.leaves(groups.last_layer))
  ours = state_dict_of(groups.weight_decay["backbone"], model, shapes)
  theirs = {name: float(not (name.endswith("bias") or "norm" in name or "gamma" in name)) for name in ours}
  different = {name for name in ours if ours[name] != theirs[name]}
  norms = {"downsample_layers.0.1.weight", *(f"downsample_layers.{i}.0.weight" for i in (1, 2, 3))}
  assert different == (set() if as_published else norms)
  assert all(theirs[name] for name in norms)


def params_and_grads():
  keys = jax.random.split(jax.random.key(0), 4)
  make = lambda k, m: {"a": {"kernel": jax.random.normal(k, (3, 4))}, "b": {"bias": jax.random.normal(m, (4,))}}  # noqa: E731
  return make(keys[0], keys[1]), make(keys[2], keys[3])


def test_adamw_equals_optax_where_all_parameters_are_decayed():
  params, grads = params_and_grads()
  group = optimizer.Groups(*(jax.tree.map(lambda _, v=value: v, params) for value in (1.0, 1.0, False)))
  moments = optimizer.adam(0.9, 0.99, 1e-8).init(params)
  peer = optax.adamw(0.1, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.2)
  state, expected = peer.init(params), params
  for _ in range(3):
    params, moments = optimizer.adamw_update(
      params, grads, moments, group, lr=0.1, last_layer_lr=0.1, weight_decay=0.2, b1=0.9, b2=0.99, eps=1e-8
    )
    updates, state = peer.update(grads, state, expected)
    expected = optax.apply_updates(expected, updates)
  chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_clipping_is_per_sub_module():
  grads = {"backbone": {"w": jnp.full((4,), 5.0)}, "dino_head": {"w": jnp.full((4,), 0.1)}}
  clipped, norms = optimizer.clip(grads, 3.0)
  np.testing.assert_allclose(norms["backbone"], 10.0)
  np.testing.assert_allclose(jnp.linalg.norm(clipped["backbone"]["w"]), 3.0, rtol=1e-5)
  np.testing.assert_array_equal(clipped["dino_head"]["w"], grads["dino_head"]["w"])
  np.testing.assert_array_equal(optimizer.clip(grads, 0.0)[0]["backbone"]["w"], grads["backbone"]["w"])


def test_ema_is_a_weighted_mean_in_the_teachers_type():
  out = ema.update({"w": jnp.ones(2)}, {"w": jnp.zeros(2, jnp.bfloat16)}, 0.75)
  np.testing.assert_array_equal(out["w"], 0.75)
  assert out["w"].dtype == jnp.float32
