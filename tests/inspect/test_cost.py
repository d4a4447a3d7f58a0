"""Tests of vit_jax/inspect/cost.py: counts against the published sizes, formulas against what JAX really multiplies."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.models.sizes import PARAMETERS
from vit_jax.config import load, resolve
from vit_jax.data.views.multi_crop.masks import masked_patches
from vit_jax.inspect.cost import abstract_params, count, dino_step, executed, head_flops, parameter_count
from vit_jax.methods.dino import dinov3
from vit_jax.models import MODELS, ProjectionHead, create_model

SMALL = dict(width=64, depth=3, num_heads=2, mlp_hidden=256, num_registers=4)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_those_published(name):
  assert count(create_model(name), 224).parameters == PARAMETERS[name]


@pytest.mark.parametrize(("name", "gmacs"), [("tiny", 4.5), ("small", 8.7), ("base", 15.4), ("large", 34.4)])
def test_convnext_operations_are_those_published(name, gmacs):
  """ConvNeXt paper, table 1: multiplications with additions at 224 pixels; its classifier is negligible."""
  assert count(create_model(f"dinov3_convnext_{name}"), 224).flops / 2e9 == pytest.approx(gmacs, abs=0.06)


@pytest.mark.parametrize(
  ("prototypes", "bottleneck", "hidden", "width", "published"),
  [(262144, 512, 8192, 4096, 239_092_224), (65536, 256, 2048, 1024, 23_597_312)],
)
def test_head_parameter_counts_are_those_published(prototypes, bottleneck, hidden, width, published):
  head = ProjectionHead(hidden=hidden, bottleneck=bottleneck, prototypes=prototypes)
  assert parameter_count(abstract_params(head, width=width)) == published


@pytest.mark.parametrize(("pixels", "tokens"), [(224, 201), (256, 261), (112, 54), (1152, 5189), ((64, 100), 29)])
def test_tokens(pixels, tokens):
  assert count(create_model("dinov3_vits16"), pixels).tokens == tokens


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_forward_formula_is_exactly_the_products_that_are_traced(mlp, unroll):
  model = create_model("vit_small", **SMALL, mlp=mlp, unroll=unroll)
  images = jax.ShapeDtypeStruct((1, 48, 80, 3), jnp.float32)
  traced = jax.make_jaxpr(model.apply)({"params": abstract_params(model)}, images)
  assert count(model, (48, 80)).flops == executed(traced.jaxpr)


def test_head_formula_is_exactly_the_products_that_are_traced():
  head = ProjectionHead(hidden=48, bottleneck=24, prototypes=100, num_layers=4)
  rows = jax.ShapeDtypeStruct((5, 32), jnp.float32)
  traced = jax.make_jaxpr(head.apply)({"params": abstract_params(head, width=32)}, rows)
  assert 5 * head_flops(head, 32) == executed(traced.jaxpr)


@pytest.mark.parametrize(("mlp", "tolerance"), [("gelu", 0.05), ("swiglu", 0.02)])
def test_forward_formula_agrees_with_xla_when_there_is_no_loop(mlp, tolerance):
  # XLA also counts element-wise work (the erf of GELU alone is a few per cent at this width).
  model = create_model("vit_small", width=256, num_heads=4, depth=2, mlp_hidden=1024, mlp=mlp, unroll=2)
  images = jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32)
  xla = jax.jit(model.apply).lower({"params": abstract_params(model)}, images).cost_analysis()["flops"]
  assert 1.0 <= xla / count(model, 112).flops < 1 + tolerance


def test_step_formula_agrees_with_the_products_of_forward_and_backward_passes():
  model = create_model("vit_small", **SMALL)
  dino, ibot = (ProjectionHead(hidden=64, bottleneck=32, prototypes=k) for k in (200, 150))
  batch, masked = 2, 6
  student = {
    "backbone": abstract_params(model),
    "dino": abstract_params(dino, width=64),
    "ibot": abstract_params(ibot, width=64),
  }

  def outputs(params, global_crops, local_crops):
    crops = [global_crops] if local_crops is None else [global_crops, local_crops]
    features = model.apply({"params": params["backbone"]}, crops)
    cls = jnp.concatenate([f.cls for f in features])
    patches = features[0].patches.reshape(-1, 64)[: batch * masked]
    return dino.apply({"params": params["dino"]}, cls).sum() + ibot.apply({"params": params["ibot"]}, patches).sum()

  def step(student, teacher, global_crops, local_crops):
    return jax.grad(outputs)(student, global_crops, local_crops), outputs(teacher, global_crops, None)

  global_crops = jax.ShapeDtypeStruct((2 * batch, 96, 96, 3), jnp.float32)
  local_crops = jax.ShapeDtypeStruct((3 * batch, 48, 48, 3), jnp.float32)
  traced = executed(jax.make_jaxpr(step)(student, student, global_crops, local_crops).jaxpr)
  cost = dino_step(model, dino, ibot, global_size=96, local_size=48, local_number=3, masked=masked)
  # The pixels get no gradient: one third of the student's patch embedding is not done.
  pixels = 2 * count(model, 96).parts["patch embedding"] + 3 * count(model, 48).parts["patch embedding"]
  assert traced == batch * (cost.flops - pixels)


@pytest.mark.parametrize("gram", [None, "global crops", "gram crops"])
def test_step_formula_agrees_with_the_products_of_the_real_training_step(gram):
  config = load(str(Path(__file__).parents[2] / "configs" / "tiny.py"))
  if gram:
    config.gram.source = "init"
  if gram == "gram crops":
    config.crops.gram_size = 48
  config = resolve(config, num_examples=64)
  net, views, batch = dinov3.modules(config), dinov3.views(config), config.batch_size
  groups = batch // views.group_size(batch)
  patches = views.mask_grid[0] * views.mask_grid[1]
  masked = masked_patches(batch // groups, views.mask_grid, views.mask_probability, views.mask_ratio)
  crops = {"global_crops": (2, views.global_size), "local_crops": (2, views.local_size)}
  crops |= {"gram_crops": (2, views.gram_size)} if views.gram_size else {}
  crops = {
    name: jax.ShapeDtypeStruct((batch, number, size, size, 3), jnp.uint8) for name, (number, size) in crops.items()
  }
  masks = {
    "masks": jax.ShapeDtypeStruct((batch, 2, patches), bool),
    "mask_indices": jax.ShapeDtypeStruct((groups, masked), jnp.int32),
    "mask_weights": jax.ShapeDtypeStruct((groups, masked), jnp.float32),
  }
  state = jax.eval_shape(lambda key: dinov3.init(config, key), jax.random.key(0))
  traced = executed(jax.make_jaxpr(dinov3.make_step(config))(state, crops | masks).jaxpr)
  sizes = {"global_size": 32, "local_size": 16, "local_number": 2, "gram_size": views.gram_size}
  cost = dino_step(*net, **sizes, masked=masked * groups / batch, gram_teacher=gram is not None)
  pixels = 2 * (count(net.backbone, 32).parts["patch embedding"] + count(net.backbone, 16).parts["patch embedding"])
  # Beyond the formula: KoLeo's neighbours, the covariance of the health metrics, the Gram matrices, their resizing.
  assert traced == pytest.approx(batch * (cost.flops - pixels), rel=0.02 if gram is None else 0.04)
  assert ("gram teacher" in cost.parts) == (gram is not None)


def test_loops_and_recomputation_are_counted_as_often_as_they_run():
  def scanned(x, w):
    return jax.lax.scan(lambda x, _: (jax.checkpoint(lambda y: jnp.tanh(y @ w))(x), None), x, length=5)[0].sum()

  x, w = jnp.zeros((4, 8)), jnp.zeros((8, 8))
  product = 2 * 4 * 8 * 8
  assert executed(jax.make_jaxpr(scanned)(x, w).jaxpr) == 5 * product
  assert executed(jax.make_jaxpr(jax.grad(scanned, (0, 1)))(x, w).jaxpr) == 5 * 4 * product  # forward twice, two back
  branches = [lambda x: x @ w, lambda x: x @ w @ w]
  assert executed(jax.make_jaxpr(lambda i, x: jax.lax.switch(i, branches, x))(0, x).jaxpr) == 2 * product


def test_an_image_smaller_than_a_patch_is_an_error():
  with pytest.raises(ValueError, match="smaller than one patch of 16"):
    count(create_model("vit_small"), 8)
