"""Weights read and written one tensor, and one shard, at a time: never the whole model in memory."""

from __future__ import annotations

import json
import mmap
import pathlib
import tracemalloc
import zipfile
from collections.abc import Callable

import chex
import jax
import ml_dtypes
import numpy as np
import pytest

import vit_jax
from vit_jax import parallel, weights
from vit_jax.models import ConvNeXt, PositionTable, Rope, VisionTransformer
from vit_jax.weights import WeightsError
from vit_jax.weights.assembly import Parameter
from vit_jax.weights.files import INDEX, SHARDS, SINGLE, open_safetensors, write_safetensors, write_sharded
from vit_jax.weights.lazy import LazyTensor
from vit_jax.weights.pth import open_pth, read_pth, write_pth

MODEL = VisionTransformer(
  patch_size=8, width=256, depth=6, num_heads=4, num_registers=2, layer_scale=1.0, norm_eps=1e-5, rope=Rope(rescale=2.0)
)
MESHES = {"one": (1, 1, 1, 1), "fsdp": (1, 1, 8, 1), "tensor": (1, 2, 2, 2), "replica": (2, 2, 2, 1)}


def mesh(name: str) -> jax.sharding.Mesh:
  sizes = dict(zip(("replica", "data", "fsdp", "tensor"), MESHES[name], strict=True))
  return parallel.make_mesh(sizes, jax.devices()[: int(np.prod(MESHES[name]))])


def random_params(model: VisionTransformer | ConvNeXt) -> dict:
  image = np.zeros((1, model.stride, model.stride, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict]:
  """A model in every format."""
  folder, params = tmp_path_factory.mktemp("models"), random_params(MODEL)
  vit_jax.save_model(folder / "hf", MODEL, params)
  vit_jax.save_model(folder / "shards", MODEL, params, max_shard_size=3_000_000)
  vit_jax.save_model(folder / "m.pth", MODEL, params, format="pth")
  vit_jax.save_model(folder / "orbax", MODEL, params, format="orbax")
  return folder, params


@pytest.mark.parametrize("name", ["hf", "shards", "m.pth", "orbax"])
@pytest.mark.parametrize("axes", ["fsdp", "tensor", "replica"])
def test_loading_onto_a_mesh_gives_the_shards_of_the_whole(saved: tuple, name: str, axes: str):
  folder, params = saved
  model, placed = vit_jax.load_model(folder / name, mesh=mesh(axes))
  where = parallel.parameter_sharding(mesh(axes))

  def same(path: tuple, ours: jax.Array, whole: np.ndarray) -> None:
    np.testing.assert_array_equal(ours, whole)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert ours.sharding.is_equivalent_to(where(name, whole.shape), whole.ndim), name

  jax.tree_util.tree_map_with_path(same, placed, params)
  kernel = placed["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // {"fsdp": 8, "tensor": 4, "replica": 2}[axes]


def peak(work: Callable[[], object]) -> int:
  """Bytes that Python and NumPy had at the most while `work` ran; neither mapped files nor jax's arrays count."""
  tracemalloc.start()
  try:
    work()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["hf", "shards", "m.pth"])
def test_no_more_than_one_shard_of_a_parameter_is_in_memory(saved: tuple, name: str, monkeypatch: pytest.MonkeyPatch):
  """The whole is 19 MB; its largest parameter, a stack over the blocks, 6.3 MB; an eighth of that 0.8 MB."""
  folder, params = saved
  largest, total = (f(leaf.nbytes for leaf in jax.tree.leaves(params)) for f in (max, sum))
  assert total > 3 * largest
  put, device_put, before = Parameter.put, jax.device_put, []

  def counted(*arguments: object) -> jax.Array:
    if not before:  # what JAX traces before is no weights
      tracemalloc.reset_peak()
    before.append(tracemalloc.get_traced_memory()[0])
    return put(*arguments)

  def elsewhere(values: np.ndarray, device: jax.Device) -> jax.Array:
    """In memory that is not counted, as that of an accelerator."""
    copy = np.frombuffer(mmap.mmap(-1, values.nbytes), values.dtype).reshape(values.shape)
    copy[...] = values
    return device_put(copy, device)

  monkeypatch.setattr(Parameter, "put", counted)
  monkeypatch.setattr(jax, "device_put", elsewhere)
  for axes, shard in (("fsdp", largest / 8), ("one", largest)):
    before.clear()
    most = peak(lambda axes=axes: vit_jax.load_model(folder / name, mesh=mesh(axes)))
    assert most - before[0] < shard + 500_000  # names and tables


def test_of_every_tensor_only_what_a_shard_needs_is_asked_for():
  """A reader that counts: no tensor of a block that lies outside a shard is touched, none is held."""
  params = random_params(MODEL)
  tensors, reads, alive = weights.to_state_dict(params, MODEL, "hf_dinov3"), [], []

  class Counted(np.ndarray):
    def __del__(self):
      alive.remove(self.nbytes)

  def counting(name: str, tensor: np.ndarray) -> LazyTensor:
    def read() -> np.ndarray:
      copy = tensor.copy().view(Counted)
      alive.append(copy.nbytes)
      reads.append((name, len(alive)))
      return copy

    return LazyTensor(tensor.shape, tensor.dtype, read)

  lazy = {name: counting(name, tensor) for name, tensor in tensors.items()}
  devices = parallel.make_mesh({"replica": 1, "data": 1, "fsdp": 2, "tensor": 1}, jax.devices()[:2])

  def by_layer(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    first = "fsdp" if path.startswith("blocks/") else None
    return jax.sharding.NamedSharding(devices, jax.P(first, *[None] * (len(shape) - 1)))

  loaded = weights.from_state_dict(lazy, MODEL, "hf_dinov3", sharding=by_layer)
  chex.assert_trees_all_equal(loaded, params)
  assert sorted(name for name, _ in reads) == sorted(tensors)  # each once: the other shard has other layers
  assert max(count for _, count in reads) == 1
  assert not alive


@pytest.mark.parametrize(
  ("model", "layout"),
  [
    (MODEL.clone(mlp="swiglu", mlp_hidden=64, width=32, depth=2, mask_k_bias=True, masking=False), "timm"),
    (MODEL.clone(mlp="swiglu", mlp_hidden=64, width=32, depth=2, mask_k_bias=True), "hf_dinov3"),
    (
      VisionTransformer(
        patch_size=8, width=32, depth=2, num_heads=4, mlp="swiglu", mlp_hidden=88, layer_scale=1.0, rope=None,
        position_table=PositionTable((2, 2)),
      ),
      "dinov2",
    ),
    (ConvNeXt(depths=(1, 1, 2, 1), widths=(8, 16, 16, 24)), "dinov3"),
  ],
)  # fmt: skip
def test_shards_of_split_packed_and_repeated_tensors_are_right(model, layout: str):
  params = random_params(model)
  state_dict = weights.to_state_dict(params, model, layout)
  whole = weights.from_state_dict(state_dict, model, layout)
  spread = weights.from_state_dict(state_dict, model, layout, sharding=parallel.parameter_sharding(mesh("tensor")))
  chex.assert_trees_all_equal(spread, whole)


def test_an_export_is_divided_as_hugging_face_does(saved: tuple, tmp_path: pathlib.Path):
  folder, params = saved
  files = sorted((folder / "shards").glob(SHARDS))
  assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
  assert not (folder / "shards" / SINGLE).exists()
  assert max(file.stat().st_size for file in files) < 3_000_000 + 10_000
  index = json.loads((folder / "shards" / INDEX).read_text())
  assert index["metadata"]["total_size"] == sum(t.nbytes for t in open_safetensors(folder / "hf").values())
  for name, tensor in open_safetensors(folder / "shards").items():
    np.testing.assert_array_equal(tensor, open_safetensors(folder / "hf")[name])
  vit_jax.save_model(folder / "again", MODEL, params, max_shard_size=3_000_000)
  vit_jax.save_model(folder / "again", MODEL, params)  # in one piece: the old pieces are gone
  assert not list((folder / "again").glob(SHARDS)) and not (folder / "again" / INDEX).exists()
  with pytest.raises(WeightsError, match="max_shard_size=0"):
    vit_jax.save_model(tmp_path / "none", MODEL, params, max_shard_size=0)
  assert not list(tmp_path.iterdir())


def test_an_export_holds_one_tensor_at_a_time(tmp_path: pathlib.Path):
  params = random_params(MODEL)
  largest = 4 * MODEL.width**2 * 4  # the bytes of one feed-forward kernel of one block
  for format, name in (("safetensors", "hf"), ("pth", "m.pth"), ("timm", "m.safetensors")):
    model, tree = (MODEL, params) if format != "timm" else (MODEL.clone(mask_k_bias=True), params)
    vit_jax.save_model(tmp_path / name, model, tree, format=format)
    assert peak(lambda: vit_jax.save_model(tmp_path / name, model, tree, format=format)) < 3 * largest + 300_000  # noqa: B023


def test_parameters_on_a_mesh_are_exported_as_from_one_device(saved: tuple, tmp_path: pathlib.Path):
  folder, params = saved
  model, placed = vit_jax.load_model(folder / "hf", mesh=mesh("tensor"))
  vit_jax.save_model(tmp_path / "m", model, placed)
  for name, tensor in open_safetensors(tmp_path / "m").items():
    np.testing.assert_array_equal(tensor, open_safetensors(folder / "hf")[name])


def test_transformers_loads_a_divided_export(saved: tuple):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder, params = saved
  theirs, report = transformers.AutoModel.from_pretrained(folder / "shards", output_loading_info=True)
  assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  batch = np.random.default_rng(1).normal(size=(1, 32, 24, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs.eval()(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
  features = MODEL.apply({"params": params}, batch)
  ours = np.concatenate([features.cls[:, None], features.registers, features.patches], axis=1)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_lazy_tensor_is_its_array(tmp_path: pathlib.Path):
  arrays = {
    "half": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    "byte": np.array([True, False, True]),
    "kernel": np.arange(20.0, dtype=np.float32).reshape(4, 5).T,
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 3), np.float16),
  }
  write_safetensors(tmp_path / "x.safetensors", arrays)
  write_sharded(tmp_path, arrays, max_shard_size=1)
  write_pth(tmp_path / "x.pth", arrays)
  for opened in (
    open_safetensors(tmp_path / "x.safetensors"),
    open_safetensors(tmp_path),
    open_pth(tmp_path / "x.pth"),
  ):
    assert opened.keys() == arrays.keys()
    for name, array in arrays.items():
      assert (opened[name].shape, opened[name].dtype, opened[name].nbytes) == (array.shape, array.dtype, array.nbytes)
      np.testing.assert_array_equal(opened[name], array)
      assert np.array(opened[name]).flags.writeable
      with pytest.raises(AttributeError):
        opened[name].shape = (1,)


def test_a_compressed_pth_and_one_by_torch_are_read(tmp_path: pathlib.Path):
  write_pth(tmp_path / "x.pth", {"a": np.arange(6.0)})
  with zipfile.ZipFile(tmp_path / "x.pth") as plain, zipfile.ZipFile(tmp_path / "y.pth", "w") as other:
    for record in plain.namelist():
      other.writestr(record, plain.read(record), zipfile.ZIP_DEFLATED)
  np.testing.assert_array_equal(open_pth(tmp_path / "y.pth")["a"], np.arange(6.0))
  by_torch = pathlib.Path(__file__).parent / "data" / "types.pth"
  np.testing.assert_array_equal(open_pth(by_torch)["transposed"], read_pth(by_torch)["transposed"])
