"""Tests of vit_jax/inspect/tables.py."""

from __future__ import annotations

import re
from pathlib import Path

from vit_jax.config import default, load
from vit_jax.inspect.cost import count, dino_step
from vit_jax.inspect.tables import config_table, flops, model_table, training_table
from vit_jax.methods.dino import dinov3
from vit_jax.models import ProjectionHead, create_model


def line_of(table, key):
  return next(line for line in table.splitlines() if re.search(rf"(^|\s){re.escape(key)}\s", line))


def test_changed_keys_are_marked_and_show_the_default():
  config = default()
  config.batch_size = 256
  config.model.rope.jitter = 1.5
  config.augment.blur = [0.0, 0.9, 0.5]  # as read back from JSON: no change
  table = config_table(config, default())
  assert [line.split()[1] for line in table.splitlines() if line.startswith("*")] == ["batch_size", "model.rope.jitter"]
  assert line_of(table, "batch_size").split() == ["*", "batch_size", "256", "default", "64"]
  assert "default None" in line_of(table, "model.rope.jitter")
  assert line_of(table, "augment.blur").split(maxsplit=1) == ["augment.blur", "(0.0, 0.9, 0.5)"]


def test_a_boolean_in_the_place_of_a_number_and_a_new_key_are_changes():
  table = config_table({"a": True, "b": 1, "c": {"d": "x"}}, {"a": 1, "b": 1.0})
  assert [line[0] for line in table.splitlines()] == ["*", " ", "*"]
  assert "new key" in line_of(table, "c.d")


def test_the_training_table_is_made_of_what_a_method_has():
  config = load(str(Path(__file__).parents[2] / "configs" / "tiny.py"))
  config.crops.local_number = 0
  table = training_table(dinov3.modules(config), dinov3.views(config), masked=[4.5])
  assert "32 -> 32 -> 32 -> 16 -> 32" in line_of(table, "dino_head")
  assert "global crop, 32 x 32 pixels" in table and "local crop, " not in table


def test_the_training_table_has_every_resolution():
  config = load(str(Path(__file__).parents[2] / "configs" / "tiny.py"))
  config.crops.resolutions = ((32, 16, 48, 0.75), (64, 16, 96, 0.25))
  modules = dinov3.modules(config)
  table = training_table(modules, dinov3.views(config), masked=[4.5, 18.0])
  for size in ("global crop, 32 x 32", "global crop, 64 x 64", "local crop, 16 x 16", "gram crop, 96 x 96"):
    assert table.count(f"{size} pixels") == 1
  assert "training step at 64/16/96 (25.0% of the steps)" in table
  sizes = ((32, 48, 4.5), (64, 96, 18.0))
  costs = [
    dino_step(*modules, global_size=g, local_size=16, local_number=2, gram_size=h, masked=m) for g, h, m in sizes
  ]
  assert [cost.parts["gram teacher"] for cost in costs] == [2 * count(modules.backbone, h).flops for h in (48, 96)]
  assert table.endswith(f"per image: {flops(0.75 * costs[0].flops + 0.25 * costs[1].flops)}")


def test_the_model_table_states_parameters_tokens_and_operations():
  model = create_model("dinov3_vits16")
  heads = {
    "dino_head": ProjectionHead(hidden=2048, bottleneck=256, prototypes=65536),
    "ibot_head": ProjectionHead(hidden=2048, bottleneck=256, prototypes=4096),
  }
  step = dino_step(model, *heads.values(), global_size=224, local_size=96, local_number=8, masked=58.9)
  table = model_table(
    model,
    image_sizes=[("global crop", 224), ("local crop", (96, 80))],
    heads=heads,
    steps=[("training step, per image", step)],
  )
  assert "21,601,152" in line_of(table, "backbone, all")
  assert "12 x" in line_of(table, "blocks")
  assert "384 -> 2048 -> 2048 -> 256 -> 65536" in line_of(table, "dino_head")
  assert "global crop, 224 x 224 pixels" in table and "local crop, 96 x 80 pixels" in table
  assert [line.split()[1] for line in table.splitlines() if line.startswith("  tokens ")][1:] == ["201", "35"]
  assert f"{count(model, 224).flops / 1e9:.3g} GFLOP" in table and "training step, per image" in table
