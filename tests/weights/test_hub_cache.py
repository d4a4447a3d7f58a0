"""Models of the Hugging Face Hub by name: from the folder where its tools keep them, never from the network."""

from __future__ import annotations

import pathlib
import shutil
import socket

import numpy as np
import pytest

import vit_jax
from tests.test_hub import MODELS, assert_same, random_params, without_unused
from vit_jax import hub
from vit_jax.weights.hub_cache import caches, is_name

NAME = "facebook/dinov3-vits16-pretrain-lvd1689m"
COMMAND = f"hf download {NAME}"


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
    monkeypatch.delenv(key, raising=False)
  monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)

  def no_network(*_: object, **__: object) -> None:
    raise AssertionError("the network was used")

  monkeypatch.setattr(socket, "create_connection", no_network)
  monkeypatch.setattr(socket, "getaddrinfo", no_network)
  return tmp_path / "home" / "hub"


def bring(cache: pathlib.Path, revision: str, seed: int = 0) -> dict:
  """A model in the cache as huggingface_hub puts it there: links to blobs."""
  folder, model = cache / "models--facebook--dinov3-vits16-pretrain-lvd1689m", MODELS["vits"]
  params = random_params(model, seed)
  vit_jax.save_model(cache / "made", model, params, mean=(0.1, 0.2, 0.3), std=(0.5,) * 3, image_size=32)
  (folder / "snapshots" / revision).mkdir(parents=True)
  (folder / "blobs").mkdir(exist_ok=True)
  for file in (cache / "made").iterdir():
    blob = folder / "blobs" / f"{revision}-{file.name}"
    file.rename(blob)
    (folder / "snapshots" / revision / file.name).symlink_to(blob)
  shutil.rmtree(cache / "made")
  return without_unused(model, params)


def point_main_to(cache: pathlib.Path, revision: str) -> pathlib.Path:
  folder = cache / "models--facebook--dinov3-vits16-pretrain-lvd1689m"
  (folder / "refs").mkdir(exist_ok=True)
  (folder / "refs" / "main").write_text(revision)
  return folder / "snapshots" / revision


def test_a_model_that_was_brought_opens_by_its_name(cache: pathlib.Path):
  old, new = bring(cache, "aaaa", 0), bring(cache, "bbbb", 1)
  with pytest.raises(hub.UnknownModel, match=rf"has other revisions than main: .*bbbb, or .*{COMMAND}"):
    vit_jax.load_model(NAME)
  point_main_to(cache, "aaaa")
  assert_same(vit_jax.load_model(NAME)[1], old)
  point_main_to(cache, "bbbb")
  assert_same(vit_jax.load_model(NAME)[1], new)
  assert hub.load_preprocessing(NAME).mean == (0.1, 0.2, 0.3)
  assert vit_jax.load_images(np.zeros((40, 40, 3), np.uint8), like=NAME).shape == (1, 32, 32, 3)


def test_one_that_is_not_here_is_one_line_with_the_command_that_brings_it(cache: pathlib.Path):
  with pytest.raises(hub.UnknownModel) as caught:
    vit_jax.load_model(NAME)
  said = str(caught.value)
  assert said.endswith(COMMAND) and "\n" not in said and str(cache) in said
  assert f"accept its licence on https://huggingface.co/{NAME}" in said
  with pytest.raises(hub.UnknownModel, match=r"hf download facebook/dinov2-small$") as caught:
    vit_jax.load_model("facebook/dinov2-small")
  assert "licence" not in str(caught.value)


def test_what_a_broken_download_left_is_said(cache: pathlib.Path):
  bring(cache, "aaaa")
  snapshot = point_main_to(cache, "aaaa")
  (snapshot / "model.safetensors").resolve().unlink()
  with pytest.raises(hub.UnknownModel, match=rf"lacks model\.safetensors, as after an interrupted .*{COMMAND}"):
    vit_jax.load_model(NAME)
  (snapshot / "model.safetensors").unlink()
  with pytest.raises(hub.UnknownModel, match="has no weights"):
    vit_jax.load_model(NAME)
  point_main_to(cache, "cccc")
  with pytest.raises(hub.UnknownModel, match="has other revisions than main"):
    vit_jax.load_model(NAME)


def test_paths_come_before_names(cache: pathlib.Path):
  model = MODELS["vits"]
  vit_jax.save_model(pathlib.Path(NAME), model, random_params(model), format="orbax")
  assert vit_jax.load_model(NAME)[0] == model
  assert not is_name(NAME) and not is_name("facebook/another")  # beside a folder of that name: a path that is not there
  with pytest.raises(hub.UnknownModel, match="There is nothing of this name"):
    vit_jax.load_model("facebook/another")
  for path in ("/org/name", "~/name", "./name", "a/b/c", "name", "../org/name", "org/na--me"):
    assert not is_name(path)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
  for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
    monkeypatch.delenv(key, raising=False)
  assert caches() == [pathlib.Path.home() / ".cache/huggingface/hub"]
  monkeypatch.setenv("XDG_CACHE_HOME", "/x")
  assert caches() == [pathlib.Path("/x/huggingface/hub")]
  monkeypatch.setenv("HF_HOME", "/home")
  assert caches() == [pathlib.Path("/home/hub")]
  monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", "/old")
  monkeypatch.setenv("HF_HUB_CACHE", "/new")
  assert caches()[:2] == [pathlib.Path("/new"), pathlib.Path("/old")]
