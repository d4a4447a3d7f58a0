"""Where the parameters go on a mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vit_jax import config as configs
from vit_jax import parallel
from vit_jax.methods.dino import dinov3
from vit_jax.models import MODELS, PositionTable, ProjectionHead, create_model
from vit_jax.parallel.rules import logical_axes

VARIANTS = [
  dict(separate_cls_norm=True),
  dict(qk_norm=True, pre_norm=True, position_table=PositionTable()),
  dict(pool="map"),
  dict(pool="map", mlp="swiglu"),
]
HEADS = [ProjectionHead(hidden=32, bottleneck=16, prototypes=64, num_layers=n) for n in (1, 2, 3, 12)]


def mesh(num_devices=8, **axes):
  return parallel.abstract_mesh(dict(replica=1, data=1, fsdp=1, tensor=1) | axes, num_devices)


@functools.cache
def state(**overrides):
  """Shapes of the training state of configs/tiny.py."""
  c = configs.load("configs/tiny.py")
  c.update_from_flattened_dict(dict(overrides))
  return jax.eval_shape(functools.partial(dinov3.init, c), jax.random.key(0))


def specs(tree, where, **kwargs):
  shardings = parallel.state_shardings(tree, where, **kwargs)
  paths = jax.tree_util.tree_leaves_with_path(shardings)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec for path, sharding in paths}


@pytest.mark.parametrize(("name", "overrides"), [(name, {}) for name in MODELS] + [("vits16", v) for v in VARIANTS])
def test_every_parameter_of_every_model_fits_exactly_one_rule(name, overrides):
  model = create_model("dinov3_vits16" if overrides else name, **overrides)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, model.in_channels)))["params"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    # Raises unless one rule fits, of the same rank.
    assert len(logical_axes(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.ndim)) == leaf.ndim


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head.num_layers} layers")
def test_every_parameter_of_every_head_fits_exactly_one_rule(head):
  params = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 24)))["params"]
  assert specs({"student": {"ibot_head": params}}, mesh(tensor=8))["student/ibot_head/last_layer/kernel"] == P(
    None, "tensor"
  )


def test_a_parameter_without_a_rule_is_named():
  with pytest.raises(ValueError, match="'student/backbone/new/kernel' of rank 1 fits 0 rules"):
    parallel.state_shardings({"student": {"backbone": {"new": {"kernel": jnp.zeros(4)}}}}, mesh(fsdp=8))


def test_specs_do_not_depend_on_the_number_of_devices():
  few, many = (specs(state(), mesh(n, fsdp=n // 2, tensor=2)) for n in (4, 16))
  assert few == many


def test_prototypes_are_divided_by_tensor_and_by_fsdp():
  for part in ("student", "teacher", "opt_state/mu"):
    assert specs(state(), mesh(fsdp=4, tensor=2))[f"{part}/dino_head/last_layer/kernel"] == P(None, ("tensor", "fsdp"))
    assert specs(state(), mesh(fsdp=8))[f"{part}/ibot_head/last_layer/kernel"] == P(None, "fsdp")


def test_zero_1_spreads_all_but_the_student_over_fsdp():
  three, one = (specs(state(), mesh(fsdp=4, tensor=2), zero=zero) for zero in (3, 1))
  kernel = "backbone/blocks/mlp/fc1/kernel"
  assert one[f"student/{kernel}"] == P(None, None, "tensor")
  assert three[f"student/{kernel}"] == one[f"teacher/{kernel}"] == one[f"opt_state/nu/{kernel}"]
  assert three[f"student/{kernel}"] == P(None, "fsdp", "tensor")
  others = {name: spec for name, spec in three.items() if not name.startswith("student/")}
  assert others == {name: spec for name, spec in one.items() if not name.startswith("student/")}


def test_a_mesh_that_leaves_parameters_whole_is_refused_with_their_names():
  with pytest.raises(parallel.MeshError) as error:
    parallel.check_spread(state(**{"model.num_heads": 4, "model.width": 48}), mesh(32, fsdp=32))
  text = str(error.value)
  assert text.startswith("mesh.fsdp=32: does not divide")
  assert "student/backbone/blocks/attn/qkv/kernel (2, 48, 3, 4, 12): 48 is no multiple" in text
  assert "dino_head/last_layer" not in text  # 32 prototypes
  assert "set mesh.fsdp=16 and leave the factor of 2 to mesh.data" in text
  parallel.check_spread(state(**{"model.num_heads": 4, "model.width": 48}), mesh(32, fsdp=16, data=2))


def test_heads_that_tensor_does_not_divide_are_refused_although_fsdp_divides_them():
  with pytest.raises(parallel.MeshError, match="mesh.tensor=4: does not divide"):
    parallel.check_spread(state(), mesh(8, fsdp=2, tensor=4))  # 2 heads


def test_small_parameters_may_stay_whole():
  leaf = jax.ShapeDtypeStruct((6,), jnp.float32)  # 6 prototypes on 4 devices
  parallel.check_spread({"student": state().student | {"centers": {"dino": leaf}}}, mesh(4, fsdp=4))
