"""Saved configs come back exactly, and differences are named."""

from __future__ import annotations

import json

import pytest

from tests.config.changed import changed
from vit_jax import config as config_lib
from vit_jax.config import ConfigError, default, flatten, load


def unusual():
  return changed(
    model__width=48, model__layer_scale=1e-5, model__qkv_bias=False, schedules__lr__cosine="50 %", evaluation__tasks=(),
    crops__global_scale=(0.1, 1 / 3), data__source="folder:/é", seed=2**31,
    crops__resolutions=((64, 32, 96, 0.75), (96, 32, 128, 0.25)),
  )  # fmt: skip


def test_saved_config_is_read_back_exactly(tmp_path):
  path = tmp_path / "runs" / "config.json"
  config_lib.save(unusual(), path)
  back = config_lib.read(path)
  before, after = flatten(unusual()), flatten(back)
  assert after == before
  assert {k: type(v) for k, v in after.items()} == {k: type(v) for k, v in before.items()}
  assert config_lib.config_hash(back) == config_lib.config_hash(unusual())
  assert [file.name for file in path.parent.iterdir()] == ["config.json"]
  assert flatten(load(str(path))) == before


def test_read_config_keeps_its_placeholders(tmp_path):
  config_lib.save(default(), tmp_path / "c.json")
  back = config_lib.read(tmp_path / "c.json")
  back.model.width = 64
  with pytest.raises(TypeError):
    back.model.width = 1.5


def test_dictionary_is_plain_json():
  values = config_lib.to_dict(unusual())
  assert json.loads(json.dumps(values)) == values
  assert flatten(config_lib.from_dict(values)) == flatten(unusual())


def test_key_of_another_version_is_named(tmp_path):
  values = config_lib.to_dict(default())
  values["dino"]["queue"] = 4096
  (tmp_path / "c.json").write_text(json.dumps(values))
  with pytest.raises(ConfigError, match=r"c\.json .*another version.*dino\.queue: no such key"):
    config_lib.read(tmp_path / "c.json")


def test_key_that_an_older_version_lacked_takes_its_default():
  values = config_lib.to_dict(default())
  del values["koleo"]["topk"]
  assert config_lib.from_dict(values).koleo.topk == default().koleo.topk


@pytest.mark.parametrize("text", ["", "[1]", '{"batch_size": "x"}'])
def test_damaged_file_is_named(tmp_path, text):
  (tmp_path / "c.json").write_text(text)
  with pytest.raises(ConfigError, match=r"c\.json"):
    config_lib.read(tmp_path / "c.json")


def test_a_file_that_is_no_config_is_damaged(tmp_path):
  (tmp_path / "c.json").write_text('{"step": 1}')
  with pytest.raises(config_lib.DamagedConfig, match=r"c\.json: has no key of a config"):
    config_lib.read(tmp_path / "c.json")


def test_missing_file_is_named(tmp_path):
  with pytest.raises(ConfigError, match=r"c\.json: no such file"):
    config_lib.read(tmp_path / "c.json")


def test_difference_names_every_changed_key():
  assert config_lib.difference(default(), default()) == []
  assert config_lib.difference(default(), changed(seed=1, model__width=64, augment__blur=(1.0, 0.1, 0.5))) == [
    "augment.blur: (0.0, 0.9, 0.5) -> (1.0, 0.1, 0.5)",
    "model.width: None -> 64",
    "seed: 0 -> 1",
  ]


def test_hash_follows_the_values():
  assert config_lib.config_hash(default()) == config_lib.config_hash(default().lock())
  assert config_lib.config_hash(default()) != config_lib.config_hash(changed(seed=1))
