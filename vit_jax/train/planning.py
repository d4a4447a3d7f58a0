"""Plans: the real training step compiled for hardware that is not there, in a process of its own.

    plan = planning.plan(config, topology("v5p:4x4x8"))      # minutes; nothing of the state is ever made

The compiler is that of the hardware where it is installed (libtpu for TPUs, XLA's CUDA plugin for GPUs: both compile
without a device), else XLA for as many simulated CPU devices: the same program and the same partition, but the fusions
and work space of a CPU, which computes in float32 much of what accelerators keep in bfloat16.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax import methods
from vit_jax.config import ConfigError
from vit_jax.data.views import Views
from vit_jax.data.views.multi_crop.masks import masked_patches
from vit_jax.inspect import cost, hlo
from vit_jax.inspect import plan as plans
from vit_jax.inspect.chips import Topology, target_config, topology
from vit_jax.inspect.collectives import collectives
from vit_jax.inspect.errors import PlanError
from vit_jax.inspect.plan import Memory, Plan
from vit_jax.methods.dino import gram
from vit_jax.train import setup
from vit_jax.train.loop import abstract_batch, abstract_state, jitted_step, mesh_context

NUM_EXAMPLES = setup.IMAGENET  # only turns epochs into steps, which no compiled step knows
# There is no GPU to time kernels on; and without timing, XLA may choose tiles for its own products that do not fit.
_GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
_COMPILERS = {"tpu": "libtpu's TPU compiler", "gpu": "XLA's GPU compiler", "cpu": "XLA for simulated CPU devices"}


def compiler_for(where: Topology, *, simulate: bool) -> str:
  """ "tpu", "gpu" or "cpu": what compiles for this hardware.

  Raises:
    PlanError: if that of a TPU is not installed.
  """
  if simulate:
    return "cpu"
  if where.chip.gpu:
    return "gpu" if _installed("jax_cuda12_plugin") or _installed("jax_cuda13_plugin") else "cpu"
  if not _installed("libtpu"):
    raise PlanError(
      f"--topology={where.name}: the compiler of TPUs is not installed (it needs no TPU): pip install 'vit-jax[tpu]'; "
      "or add --simulate for an estimate by simulated CPU devices"
    )
  return "tpu"


def _installed(name: str) -> bool:
  found = importlib.util.find_spec(name)
  return found is not None and found.origin is not None  # a folder of that name is no module


def plan(config: ConfigDict, where: Topology, *, simulate: bool = False) -> Plan:
  """The plan of a config on some hardware, made in another process, which needs devices of its own.

  Raises:
    PlanError: if it cannot be compiled.
    ConfigError: if the config does not fit the hardware.
  """
  compiler = compiler_for(where, simulate=simulate)
  # libtpu locks the TPUs of a host for its process; one that only compiles needs none, and must not wait for another.
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  if compiler == "gpu":
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_GPU_FLAGS}".strip()
  with tempfile.TemporaryDirectory(prefix="vit_jax_plan_") as folder:
    request, answer = Path(folder) / "config.json", Path(folder) / "plan.json"
    configs.save(config, request)
    command = [sys.executable, "-m", "vit_jax.train.planning", str(request), where.name, compiler, str(answer)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode or not answer.exists():
      last = "\n".join(done.stderr.strip().splitlines()[-15:])
      killed = " (killed: for want of memory of this machine?)" if done.returncode == -9 else ""
      raise PlanError(f"--topology={where.name}: the compiling process ended with {done.returncode}{killed}\n{last}")
    values = json.loads(answer.read_text())
  if "error" in values:
    raise (ConfigError if values["of_config"] else PlanError)(values["error"])
  return Plan.from_dict(values)


def make_plan(config: ConfigDict, where: Topology, devices: Sequence[Any], compiler: str) -> Plan:
  """The plan, in this process, on devices that may be descriptions of devices.

  Raises:
    ConfigError: if the config does not fit the devices.
  """
  run = prepare(config, devices)
  views = max(run.views.variants(), key=lambda views: tuple(views.sizes.values()))
  state, batch = abstract_state(run), abstract_batch(run, views)
  began = time.perf_counter()
  with mesh_context(run.mesh):
    traced = jitted_step(run, state, views).trace(state, batch)
    executed = cost.executed(traced.jaxpr) / run.mesh.size
    lowered = traced.lower()
    lowering, began = time.perf_counter() - began, time.perf_counter()
    try:
      compiled, wanted = lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:
      compiled, wanted = None, _wanted(str(error))
  seconds = time.perf_counter() - began
  memory = _memory(compiled, wanted, plans.state_bytes(state, batch))
  chip = where.chip
  found = Plan(
    topology=where.name,
    compiler=_COMPILERS[compiler],
    devices=run.mesh.size,
    mesh=dict(run.mesh.shape),
    settings={
      "batch_size": run.config.batch_size,
      "micro_batches": run.config.micro_batches,
      "remat": run.config.model.remat,
      "crops": views.name,
    },
    memory=memory,
    capacity=chip.hbm,
    model_flops=model_flops(run.config, views),
    step_flops=executed,
    peak_flops=chip.flops,
    lower_seconds=lowering,
    compile_seconds=seconds,
    host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
  )
  return found if compiled is None else _timed(found, compiled, where, executed)


def _timed(found: Plan, compiled: Any, where: Topology, executed: float) -> Plan:
  """The plan with what its program says it moves."""
  chip = where.chip
  program = hlo.Program(compiled.as_text())
  moved = tuple(collectives(program, devices=found.devices, host=chip.per_host))
  traffic = hlo.memory_traffic(program, fast=chip.gpu is None)
  return dataclasses.replace(
    found,
    traffic=traffic,
    collectives=moved,
    compute=max(executed, found.model_flops * found.settings["batch_size"] / found.devices) / chip.flops,
    hbm=traffic / chip.bandwidth,
    network=plans.network_seconds(where, moved),
  )


def _memory(compiled: Any, wanted: int, state: dict[str, int]) -> Memory:
  held = sum(state.values())
  if compiled is None:
    return Memory(**state, temporary=wanted, peak=held + wanted)
  stats = compiled.memory_analysis()
  whole = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
  whole += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
  return Memory(**state, temporary=max(whole - held, 0), peak=whole)


def _wanted(error: str) -> int:
  """The bytes for which a compiler gave up.

  Raises:
    PlanError: if it gave up for another reason.
  """
  found = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", error)
  if not found:
    raise PlanError(f"the step cannot be compiled: {error}")
  number, unit = (part for part in found.groups() if part)
  return int(float(number) * 1024 ** " KMGT".index(unit))


def prepare(config: ConfigDict, devices: Sequence[Any]) -> setup.Run:
  """The run on these devices, without its data.

  Raises:
    ConfigError: if the config does not fit them.
  """
  return setup.fit(config, NUM_EXAMPLES, devices, platform="accelerator")


def model_flops(config: ConfigDict, views: Views) -> float:
  """Operations of a training step per image by the formulas of `inspect.cost`, of all models of a run."""
  group, frozen = config.loss_group_size, methods.frozen_teacher(config)
  masked = masked_patches(group, views.mask_grid, views.mask_probability, views.mask_ratio) / group
  sizes = {"global_size": views.global_size, "local_size": views.local_size, "local_number": views.local_number}
  total = 0.0
  for alone in methods.each_student(config).values():
    total += cost.dino_step(
      *methods.get(config.method).modules(alone),
      **sizes,
      masked=masked,
      gram_size=views.gram_size,
      gram_teacher=gram.has_own_pass(alone, distilling=frozen is not None),
      own_teacher=frozen is None,
    ).flops
  if frozen is not None:
    net = frozen.modules
    total += 2 * (
      cost.count(net.backbone, views.global_size).flops + cost.head_flops(net.dino_head, net.backbone.width)
    )
    total += masked * cost.head_flops(net.ibot_head, net.backbone.width)
  return total


def described_devices(where: Topology, compiler: str) -> Sequence[Any]:
  """The devices to compile for; changes the settings of JAX in this process, which has none of its own yet."""
  jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is part of the answer
  if compiler == "cpu":
    jax.config.update("jax_num_cpu_devices", where.devices)
    return jax.devices("cpu")
  from jax.experimental import topologies

  if compiler == "tpu":
    name = "x".join(str(size) for size in where.shape)
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{where.chip.name}:{name}").devices
  hosts = max(1, where.devices // where.chip.per_host)
  shape = f"1x{hosts}x{where.devices // hosts}"
  return topologies.get_topology_desc(
    platform="cuda", topology_name=where.name, target_config=target_config(where.chip), topology=shape
  ).devices


def _main(request: str, name: str, compiler: str, answer: str) -> None:
  where = topology(name)
  try:
    devices = described_devices(where, compiler)
    values = make_plan(configs.load(request), where, devices, compiler).to_dict()
  except (PlanError, ConfigError) as error:
    values = {"error": str(error), "of_config": isinstance(error, ConfigError)}
  except jax.errors.JaxRuntimeError as error:
    values = {"error": f"--topology={name}: its compiler says: {error}", "of_config": False}
  Path(answer).write_text(json.dumps(values))


if __name__ == "__main__":
  _main(*sys.argv[1:])
