"""From the keys of a config to the backbone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.config.changed import changed
from vit_jax.config import resolve, validate
from vit_jax.methods.settings import TRUNCATED, build_backbone, build_schedules
from vit_jax.models import ConvNeXt, PositionTable, Rope, VisionTransformer

PLAIN = dict(model__name="vit_s16")
NOT_SETTINGS = {"parent", "name"}  # of every Linen module
DECIDED = {"masking", "param_dtype"}  # by the method: masks need a mask token; parameters stay float32


def backbone(**values):
  config = changed(**values)
  validate(config)
  return build_backbone(config)


@pytest.mark.parametrize("module", [VisionTransformer, ConvNeXt])
def test_every_attribute_of_a_backbone_has_a_key(module):
  attributes = {field.name for field in dataclasses.fields(module)} - NOT_SETTINGS - DECIDED
  assert attributes <= set(changed().model)


def test_attributes_are_set_by_their_keys():
  values = dict(class_token=False, pool="map", qk_norm=True, pre_norm=True, patch_bias=False, in_channels=1)
  model = backbone(augment__mean=(0.5,), augment__std=(0.2,), **{f"model__{k}": v for k, v in values.items()})
  assert {name: getattr(model, name) for name in values} == values
  assert model.masking
  model = backbone(model__name="dinov3_convnext_tiny", model__depths=(1, 1, 2, 1), model__widths=(8, 16, 16, 24))
  assert (model.depths, model.widths) == ((1, 1, 2, 1), (8, 16, 16, 24))


@pytest.mark.parametrize(
  ("values", "rope", "table"),
  [
    ({}, Rope(rescale=2.0), None),
    (dict(model__rope__base=50.0), Rope(base=50.0, rescale=2.0), None),
    (dict(model__positions="none"), None, None),
    (dict(model__positions="sincos"), None, PositionTable(kind="sincos")),
    (dict(model__positions="learned"), None, PositionTable((14, 14))),
    (dict(model__positions="learned", crops__global_size=256), None, PositionTable((16, 16))),
    (dict(model__positions="learned", model__position_table__image_size=96), None, PositionTable((6, 6))),
    (PLAIN, None, PositionTable((14, 14))),
    (PLAIN | dict(crops__global_size=256), None, PositionTable((14, 14))),
    (PLAIN | dict(model__position_table__antialias=True), None, PositionTable((14, 14), antialias=True)),
    (PLAIN | dict(model__positions="rope", model__rope__rescale=2.0), Rope(rescale=2.0), None),
    (PLAIN | dict(model__positions="none"), None, None),
  ],
)
def test_positions_are_those_asked_for(values, rope, table):
  model = backbone(**values)
  assert (model.rope, model.position_table) == (rope, table)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(model__class_token=False), "model.pool='cls': needs a class token"),
    (dict(model__pool="distilled", model__num_registers=0), "model.pool='distilled': needs a distillation token"),
    (dict(model__pool_norm=True, model__separate_cls_norm=True), "model.pool_norm=True: does not go with"),
    (dict(model__num_heads=5), "model.num_heads=5: must divide width=384"),
    (dict(model__num_heads=64), "model.num_heads=64: .* into heads whose width is a multiple of 4"),
    (dict(model__depths=(1, 1)), "model.depths: dinov3_vits16 is a VisionTransformer, which has no such attribute"),
    (
      dict(model__name="dinov3_convnext_tiny", model__positions="none"),
      "model.positions: dinov3_convnext_tiny is a ConvNeXt, which has no such attribute",
    ),
    (
      dict(model__name="dinov3_convnext_tiny", model__depths=(3, 3)),
      r"model.depths=\(3, 3\): must have as many stages as widths",
    ),
  ],
)
def test_attributes_that_do_not_fit_are_named_by_key(values, message):
  with pytest.raises(ValueError, match=message):
    backbone(**values)


@pytest.mark.parametrize("model", [VisionTransformer(depth=1), ConvNeXt(depths=(1,), widths=(8,))])
def test_images_of_other_channels_are_refused(model):
  shapes = jax.eval_shape(model.clone(in_channels=5).init, jax.random.key(0), jnp.zeros((1, 16, 16, 5)))
  assert any(5 in leaf.shape for leaf in jax.tree.leaves(shapes))
  with pytest.raises(ValueError, match=r"the images have 5 channels and the model takes 3: .*in_channels=5"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 5)))


def test_truncation_is_of_the_cosines_of_optimizer_and_teacher_alone():
  values = dict(duration="100 steps", schedules__version=1, schedules__lr__warmup="0 steps")
  whole, cut = (
    build_schedules(resolve(changed(schedules__truncate=share, **values), num_examples=64), 1.0)
    for share in (0.0, 0.25)
  )
  assert {name for name in whole if whole[name](50) != cut[name](50)} == set(TRUNCATED)
  lr = cut["lr"]  # reference section 12: from 1 to 0 in 100 steps, a quarter more
  assert (lr(1) - lr.end) / (lr.peak - lr.end) == pytest.approx(0.9998223, abs=1e-7)
  assert (lr(50) - lr.end) / (lr.peak - lr.end) == pytest.approx(0.6120565, abs=1e-7)
