"""A trace read back: which part of the method an operation is, and times that are counted once."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

from vit_jax.inspect.errors import ProfileError
from vit_jax.inspect.hlo import Program
from vit_jax.inspect.profile import Profile, part_of, parts_by_operation, report, seconds_by_part

BODY = "VisionTransformer/VisionTransformer._forward/while/body"


@pytest.mark.parametrize(
  ("name", "part", "column"),
  [
    (f"jit(whole)/jvp(student)/{BODY}/closed_call/blocks/blocks/attn/qkv/dot_general", "attention", "forward"),
    (f"jit(whole)/transpose(jvp(student))/{BODY}/closed_call/blocks/blocks/mlp/fc1/mul", "feed-forward", "backward"),
    (f"x/jvp(student)/{BODY}/checkpoint/rematted_computation/blocks/blocks/attn/exp", "attention", "backward"),
    (f"jit(whole)/teacher/VisionTransformer/{BODY}/closed_call/blocks/blocks/norm1/mul", "norms, residuals, drop path",
     "teacher"),
    (f"jit(whole)/jvp(gram_teacher)/{BODY}/closed_call/blocks/blocks/attn/proj/add", "attention", "teacher"),
    (f"x/transpose(jvp(student))/{BODY}/jit(dynamic_index_in_dim)/squeeze", "weights and tokens between blocks",
     "backward"),
    ("jit(whole)/jvp(student)/dino_head/losses/exp", "losses", "forward"),
    ("jit(whole)/transpose(jvp(student))/ibot_head/ProjectionHead.project/fc2/dot_general", "heads", "backward"),
    ("jit(whole)/teacher/targets/exp", "targets (Sinkhorn-Knopp)", "teacher"),
    ("jit(whole)/jvp(koleo)/vmap(vmap())/dot_general", "losses", "forward"),
    ("jit(whole)/optimizer/add", "optimizer, EMA", "rest"),
    ("jit(whole)/augment/dot_general", "crops", "rest"),
    ("", "other", "rest"),
  ],
)  # fmt: skip
def test_operations_belong_to_the_part_whose_scope_they_were_traced_in(name, part, column):
  assert part_of(name) == (part, column)


def event(name, start, length, **stats):
  return types.SimpleNamespace(name=name, start_ns=start, duration_ns=length, stats=stats.items())


def traced(monkeypatch, tmp_path, *planes):
  """Planes of (name, {line: events}) as the trace of a folder."""
  (tmp_path / "host.xplane.pb").touch()
  made = [
    types.SimpleNamespace(
      name=name, lines=[types.SimpleNamespace(name=line, events=found) for line, found in lines.items()]
    )
    for name, lines in planes
  ]
  data = types.SimpleNamespace(from_file=lambda path: types.SimpleNamespace(planes=made))
  monkeypatch.setattr(jax.profiler, "ProfileData", data)


PROGRAM = Program("""\
%body (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  ROOT %dot.1 = f32[4] dot(%p, %p), metadata={op_name="jit(f)/jvp(student)/blocks/attn/dot_general"}
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4] parameter(0)
  %loop = f32[4] while(%a), condition=%none, body=%body, metadata={op_name="jit(f)/jvp(student)/while"}
  %sum = f32[4] all-reduce(%loop), replica_groups={}, metadata={op_name="jit(f)/transpose(jvp(student))/blocks/mlp"}
  ROOT %end = f32[4] add(%sum, %sum), metadata={op_name="jit(f)/optimizer/add"}
}
""")


def test_the_time_of_a_loop_is_without_that_of_its_body(monkeypatch, tmp_path):
  events = [event("loop", 0, 100), event("dot.1", 10, 30), event("unknown", 15, 5), event("dot.1", 50, 40)]
  traced(monkeypatch, tmp_path, ("/host:CPU", {"thread": events, "other": [event("end", 5, 20)]}))
  found = seconds_by_part(tmp_path, [PROGRAM], steps=2)
  nanoseconds = {key: round(seconds * 2e9) for key, seconds in found.items()}
  assert nanoseconds == {("other", "forward"): 30, ("attention", "forward"): 70, ("optimizer, EMA", "rest"): 20}


def test_of_several_devices_the_mean_counts_and_the_host_does_not(monkeypatch, tmp_path):
  kernels = [event("gemm_fusion", 0, 40, hlo_op="dot.1"), event("ncclKernel", 50, 10, hlo_op="sum")]
  devices = [(f"/device:GPU:{i}", {"Stream #7": kernels}) for i in range(2)]
  traced(monkeypatch, tmp_path, ("/host:CPU", {"thread": [event("end", 0, 9)]}), *devices)
  found = seconds_by_part(tmp_path, [PROGRAM], steps=1)
  expected = {("attention", "forward"): 40e-9, ("collectives", "backward"): 10e-9}
  assert found == pytest.approx(expected)


def test_a_trace_of_something_else_is_refused(monkeypatch, tmp_path):
  traced(monkeypatch, tmp_path, ("/host:CPU", {"thread": [event("other", 0, 9)]}))
  with pytest.raises(ProfileError, match="no operation of the step"):
    seconds_by_part(tmp_path, [PROGRAM], steps=1)


def test_instructions_of_a_real_program_have_the_parts_of_their_scopes():
  @jax.jit
  def step(x):
    with jax.named_scope("teacher"), jax.named_scope("attn"):
      y = x @ x
    with jax.named_scope("optimizer"):
      return jnp.sort(y)

  program = Program(step.lower(jnp.ones((16, 16))).compile().as_text())
  assert {("attention", "teacher"), ("optimizer, EMA", "rest")} <= set(parts_by_operation(program).values())


def test_the_table_adds_up():
  parts = {("attention", "forward"): 0.003, ("attention", "backward"): 0.006, ("losses", "forward"): 0.001}
  lines = report(Profile(parts, step=0.02, traced=0.03, waiting=0.001)).splitlines()
  assert lines[0].split() == ["ms", "a", "step", "forward", "backward", "all", "share"]
  assert lines[1].split() == ["attention", "3", "6", "9", "90.0%"]
  assert lines[3].split() == ["all", "4", "6", "10", "100.0%"]
  assert lines[-1].startswith("from step to step 20 ms, 1 of it waiting for data")
