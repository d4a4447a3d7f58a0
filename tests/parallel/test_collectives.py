"""What a program sends between devices, and that an offending one is found."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.parallel.collectives import moved_activations
from vit_jax import parallel
from vit_jax.inspect.collectives import Moved, moved
from vit_jax.inspect.hlo import Program
from vit_jax.train.loop import mesh_context

ROWS, WIDTH, PROTOTYPES = 64, 24, 320
KERNEL = (WIDTH, PROTOTYPES)
LAST = ("fsdp", "tensor")


@pytest.fixture(scope="module")
def mesh():
  return parallel.make_mesh(dict(replica=1, data=2, fsdp=2, tensor=2))


def compiled(function, mesh, *shapes_and_specs):
  args = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes_and_specs
  ]
  with mesh_context(mesh):
    return jax.jit(function).lower(*args).compile().as_text()


def offences(function, mesh, *shapes_and_specs):
  return moved_activations(
    moved(Program(compiled(function, mesh, *shapes_and_specs)), mesh),
    mesh,
    [KERNEL],
    batch_axes=parallel.BATCH_AXES,
    largest_sum=WIDTH,
    prototypes=[PROTOTYPES],
  )


def module(lines: str) -> Program:
  return Program("ENTRY %main (p: f32[]) -> f32[] {\n" + lines + "\n}")


ROWS_SPREAD = ((ROWS, WIDTH), P(parallel.BATCH_AXES))
LOGITS_SPREAD = ((ROWS, PROTOTYPES), P(parallel.BATCH_AXES, "tensor"))
KERNEL_SPREAD = (KERNEL, P(None, ("tensor", "fsdp")))


@pytest.mark.parametrize(
  ("groups", "axes"),
  [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
    ("replica_groups=[4,2]<=[8]", ("tensor",)),
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0':(2)2}", ("fsdp",)),
    ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,2,2]T(2,1,0)) {'axis_1'}", LAST),
    ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", ("data",)),
    ("replica_groups={}", ("data", "fsdp", "tensor")),
  ],
)  # fmt: skip
def test_groups_of_devices_are_read_as_axes_of_the_mesh(mesh, groups, axes):
  line = (
    f'  %x.1 = f32[24,320]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{1}}, metadata={{op_name="a/b"}}'
  )
  assert moved(module(line), mesh) == [Moved("all-gather", "f32", (24, 320), axes, "a/b")]


def test_results_of_combined_and_of_asynchronous_collectives_are_all_found(mesh):
  text = """
    %a = (f32[], bf16[3,4]{1,0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%sum
    %b = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  """
  assert [(one.kind, one.shape) for one in moved(module(text), mesh)] == [
    ("all-reduce", ()),
    ("all-reduce", (3, 4)),
    ("all-gather", (8, 4)),
  ]


def test_gathered_activations_are_found(mesh):
  found = offences(lambda x: jax.lax.with_sharding_constraint(jnp.sin(x), P()), mesh, ROWS_SPREAD)
  assert ("all-gather", (ROWS, WIDTH)) in [(one.kind, one.shape) for one in found]


def test_rows_taken_by_global_indices_are_found(mesh):
  """Such an index reaches rows of every device: why masked tokens and drop-path subsets count within loss groups."""
  indices = jnp.arange(ROWS - 1, -1, -3)
  assert offences(lambda x: jnp.sin(x)[indices], mesh, ROWS_SPREAD)


def test_rows_taken_within_groups_are_not(mesh):
  def take(x):
    groups = x.reshape(16, 4, WIDTH)
    return jnp.take_along_axis(groups, jnp.full((16, 2, 1), 3), axis=1)

  assert not offences(take, mesh, ROWS_SPREAD)


def test_gathered_logits_are_found(mesh):
  whole = P(parallel.BATCH_AXES, None)
  found = offences(lambda x: jax.lax.with_sharding_constraint(jnp.sin(x), whole), mesh, LOGITS_SPREAD)
  assert [(one.shape[-1], one.axes) for one in found] == [(PROTOTYPES, ("tensor",))]


def test_a_softmax_that_sorts_its_logits_is_found(mesh):
  assert offences(lambda x: jnp.sort(x, axis=-1), mesh, LOGITS_SPREAD)


def test_top_k_over_groups_is_found(mesh):
  """Why KoLeo takes its neighbours one after the other."""
  assert offences(lambda x: jax.lax.top_k(jnp.sin(x), 2)[1], mesh, ROWS_SPREAD)


def test_scores_and_their_gradient_move_only_the_prototypes_and_sums(mesh):
  def loss(x, kernel):
    kernel = nn.with_logical_constraint(kernel, (None, "prototypes"))
    logits = nn.with_logical_constraint(x @ kernel, ("batch", "prototypes"))
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

  gradients = jax.value_and_grad(loss, argnums=(0, 1))
  assert not offences(gradients, mesh, ROWS_SPREAD, KERNEL_SPREAD)
  found = moved(Program(compiled(gradients, mesh, ROWS_SPREAD, KERNEL_SPREAD)), mesh)
  gathered = [(one.shape, one.axes) for one in found if one.kind == "all-gather"]
  assert gathered == [((WIDTH, PROTOTYPES // 2), ("fsdp",))]  # only over fsdp: no device needs all of them
