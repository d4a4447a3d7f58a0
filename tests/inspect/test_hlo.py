"""What is read from the text of a compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax.inspect.collectives import collectives
from vit_jax.inspect.hlo import Program, bytes_of, memory_traffic

# As a TPU compiler writes it: layouts with tiles and memory spaces, asynchronous pairs, an all-reduce within a fusion.
TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%sliced (p0: f32[10,64], p1: s32[]) -> f32[64] {
  %p0 = f32[10,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
  ROOT %row = f32[64]{0} bitcast(%slice)
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %reduced = f32[64]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %part = f32[8]{0} dynamic-slice(%reduced, %i), dynamic_slice_sizes={8}
}

%body (arg: (s32[], f32[10,64], bf16[64])) -> (s32[], f32[10,64], bf16[64]) {
  %arg = (s32[], f32[10,64]{1,0:T(8,128)}, bf16[64]{0:T(1024)(128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %stack = f32[10,64]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %half = bf16[64]{0} get-tuple-element(%arg), index=2
  %layer = f32[64]{0:T(1024)} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %start = (bf16[64]{0}, bf16[256]{0:T(1024)}) all-gather-start(%half), replica_groups=[2,4]<=[4,2]T(1,0)
  %done = bf16[256]{0} all-gather-done(%start)
  %fused = f32[8]{0} fusion(%layer), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], f32[10,64]{1,0}, bf16[64]{0}) tuple(%i, %stack, %half)
}

%condition (arg.1: (s32[], f32[10,64], bf16[64])) -> pred[] {
  %arg.1 = (s32[], f32[10,64]{1,0}, bf16[64]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p.0: f32[10,64], p.1: bf16[64]) -> f32[4] {
  %p.0 = f32[10,64]{1,0} parameter(0)
  %p.1 = bf16[64]{0} parameter(1)
  %init = (s32[], f32[10,64]{1,0}, bf16[64]{0}) tuple(%c, %p.0, %p.1)
  %loop = (s32[], f32[10,64]{1,0}, bf16[64]{0}) while(%init), condition=%condition, body=%body
  %near = f32[4]{0:S(1)} copy(%x)
  ROOT %total = f32[4]{0} all-reduce(%near), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
}
"""


def test_bytes_of_types():
  assert bytes_of("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
  assert bytes_of("(f32[4]{0}, pred[3], s32[])") == 16 + 3 + 4
  assert bytes_of("f32[4]{0:T(128)S(1)}", fast=True) == 0
  assert bytes_of("f8e4m3fn[16]") == 16


def test_collectives_in_loops_count_as_often_as_the_loop_runs():
  found = {c.kind: c for c in collectives(Program(TEXT), devices=8, host=4)}
  assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
  gather, scatter, reduce = found["all-gather"], found["reduce-scatter"], found["all-reduce"]
  assert (gather.count, gather.payload, gather.wire) == (10, 10 * 4 * 64 * 2, 10 * 3 * 64 * 2)
  assert (gather.group, gather.per_host) == (4, 2)  # devices 0, 2, 4, 6
  assert (scatter.count, scatter.payload, scatter.wire) == (10, 10 * 64 * 4, 10 * 64 * 4 * 7 / 8)
  assert (reduce.count, reduce.wire, reduce.group, reduce.per_host) == (1, 2 * 16 / 2, 2, 2)


def test_of_a_stack_that_a_loop_slices_the_slices_count_as_traffic():
  program = Program(TEXT)
  rows = 10 * (64 * 4 + 4 + 64 * 4)  # a row of the stack and the index in, the row out
  gathers, scatters = 10 * 2 * 64 * 2, 10 * (64 * 4 + 8 * 4)
  compares = 11 - 1  # ten runs of the condition, of a byte; and its operands
  rest = memory_traffic(program, fast=True) - rows - gathers - scatters
  assert rest <= compares * 9
  assert memory_traffic(program, fast=False) > memory_traffic(program, fast=True)


@pytest.mark.parametrize("form", ["known", "condition"])
def test_the_trips_of_a_loop_are_found_either_way(form):
  known = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
  text = TEXT if form == "condition" else TEXT.replace("body=%body", known)
  gathers = [c for c in collectives(Program(text), devices=8, host=4) if c.kind == "all-gather"]
  assert gathers[0].count == (10 if form == "condition" else 7)


def test_a_program_that_was_really_compiled():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec(None, "x"))
  whole = NamedSharding(mesh, PartitionSpec())

  def layers(stack, x):  # each layer's matrix is gathered when it is needed
    gathered = lambda w: jax.lax.with_sharding_constraint(w, whole)  # noqa: E731
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ gathered(w)), None), x, stack)[0]

  stack = jax.ShapeDtypeStruct((6, 64, 64), np.float32, sharding=split)
  x = jax.ShapeDtypeStruct((16, 64), np.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
  text = jax.jit(layers).lower(stack, x).compile().as_text()
  (gather,) = (c for c in collectives(Program(text), devices=8, host=8) if c.kind == "all-gather")
  assert gather.payload == 6 * 64 * 64 * 4 and gather.wire == gather.payload * 7 / 8
  assert memory_traffic(Program(text), fast=False) >= gather.payload


def test_what_a_fusion_within_a_fusion_slices_counts_as_the_slice():
  """As a TPU's products have the fusions of their operands inside, those too that read one layer of all."""
  text = """\
HloModule jit_step

%layer (stack: f32[24,64,8], i: s32[]) -> f32[64,8] {
  %stack = f32[24,64,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,64,8]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,64,8}
  ROOT %rows = f32[64,8]{1,0} bitcast(%slice)
}

%product (all: f32[24,64,8], which: s32[], x: f32[64,8]) -> f32[8,8] {
  %all = f32[24,64,8]{2,1,0} parameter(0)
  %which = s32[] parameter(1)
  %x = f32[64,8]{1,0} parameter(2)
  %own = f32[64,8]{1,0} fusion(%all, %which), kind=kLoop, calls=%layer
  ROOT %y = f32[8,8]{1,0} convolution(%own, %x), dim_labels=fb_io->bf
}

ENTRY %main (a: f32[24,64,8], b: s32[], c: f32[64,8]) -> f32[8,8] {
  %a = f32[24,64,8]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[64,8]{1,0} parameter(2)
  ROOT %done = f32[8,8]{1,0} fusion(%a, %b, %c), kind=kOutput, calls=%product
}
"""
  layer, index, rows, result = 4 * 64 * 8, 4, 4 * 64 * 8, 4 * 8 * 8
  assert memory_traffic(Program(text), fast=True) == layer + index + rows + result
