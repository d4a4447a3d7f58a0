"""The hardware that can be planned for."""

from __future__ import annotations

import pytest

from vit_jax.inspect.chips import CHIPS, known, peak_flops, target_config, topology
from vit_jax.inspect.errors import PlanError


@pytest.mark.parametrize(
  ("name", "devices"), [("v5p:4x4x8", 128), ("v5e:16x16", 256), ("tpu7x:2x2x2", 16), ("h100:256", 256), ("H200:4", 4)]
)
def test_devices_of_a_topology(name, devices):
  assert topology(name).devices == devices


@pytest.mark.parametrize("name", ["v5p", "v9:4x4", "v5p:4x4", "h100:4x4", "v5e:0x4", "h100:x", "nope:8", ""])
def test_unknown_topologies_list_the_known_ones(name):
  with pytest.raises(PlanError) as error:
    topology(name)
  assert all(f"  {chip}:" in str(error.value) for chip in CHIPS)


def test_gpus_come_in_whole_hosts():
  with pytest.raises(PlanError, match="whole hosts of 8"):
    topology("h100:12")


def test_figures_are_plausible_and_have_a_source():
  for chip in CHIPS.values():
    assert 1e14 < chip.flops < 1e16 and 16e9 < chip.hbm < 1e12 and 5e11 < chip.bandwidth < 1e13
    assert 50 < chip.flops / chip.bandwidth < 600  # operations a byte
    assert chip.source and f"{chip.name}:" in known()


def test_a_gpu_is_described_for_its_compiler():
  text = target_config(CHIPS["h100"])
  assert "core_count: 132" in text and "major: 9" in text and text.count("{") == text.count("}")


@pytest.mark.parametrize(
  ("kind", "chip"),
  [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p")],
)
def test_the_peak_of_a_device_by_its_kind(kind, chip):
  assert peak_flops(kind) == CHIPS[chip].flops


def test_a_cpu_has_no_known_peak():
  assert peak_flops("cpu") is None
