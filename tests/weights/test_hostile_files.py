"""Weight files made to take memory, to hang or to run code: refused in a line, before memory is taken."""

from __future__ import annotations

import io
import json
import pathlib
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

import vit_jax
from tests.weights.test_broken_files import DINOV2, DINOV3, random_params, saved
from tests.weights.torch_pickle import Raw, Tensor, call, made, name, pickled, save, save_distributed, save_old
from vit_jax import hub
from vit_jax.weights import WeightsError, storages
from vit_jax.weights.files import INDEX
from vit_jax.weights.opening import open_weights
from vit_jax.weights.pth import open_pth, read_pth

ONE = np.ones(1, np.float32)
MUCH = 64 * 2**20  # bytes that a refusal may take


def refused(path: pathlib.Path, opener: Callable = open_weights) -> str:
  """The message of the refusal, which takes little memory and time."""
  tracemalloc.start()
  began = time.monotonic()
  try:
    with pytest.raises(WeightsError) as caught:
      opener(path)
    assert tracemalloc.get_traced_memory()[1] < MUCH
  finally:
    tracemalloc.stop()
  assert time.monotonic() - began < 20
  assert path.name in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).isprintable()
  return str(caught.value)


def weights_of_dinov2() -> dict[str, np.ndarray]:
  return vit_jax.weights.to_state_dict(random_params(DINOV2), DINOV2, "dinov2")


def test_a_tensor_cannot_repeat_its_storage_for_ever(tmp_path: pathlib.Path):
  content = {"cls_token": Tensor(ONE, shape=(1, 1, 2**29), stride=(0, 0, 0))}
  assert "2.15 GB, but the file has" in refused(save(tmp_path / "x.pth", content))
  assert "2.15 GB, but the file has" in refused(save_old(tmp_path / "x.pth", content))
  small = {"x": Tensor(ONE, shape=(3, 2), stride=(0, 0))}  # as torch saves an expanded tensor
  np.testing.assert_array_equal(read_pth(save(tmp_path / "x.pth", small))["x"], np.ones((3, 2)))


def test_many_tensors_cannot_be_one_storage(tmp_path: pathlib.Path):
  """Each alone would be allowed; a backbone of all of them would take 800 times the file."""
  values = np.zeros(2**20, np.float32)
  state = {"patch_embed.proj.weight": Tensor(np.zeros((64, 3, 8, 8), np.float32), key="p")}
  state |= {f"blocks.{i}.mlp.fc1.weight": Tensor(values, shape=(2**10, 2**10), stride=(2**10, 1), key="s")
            for i in range(800)}  # fmt: skip
  assert "its backbone would take 3.36 GB" in refused(save(tmp_path / "x.pth", state))


@pytest.mark.parametrize("name", ["data.pkl", "data/0", "byteorder", "extra/model.json"])
def test_a_small_archive_does_not_become_a_large_record(tmp_path: pathlib.Path, name: str):
  record = f"archive/{name}"
  pickle = b"\x80\x02" + pickled({"a": Tensor(np.zeros(2**25, np.float32), key="0")}) + b"."
  with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
    for entry, content in {"archive/data.pkl": pickle, "archive/data/0": bytes(2**27)}.items():
      archive.writestr(entry, content if entry != record else bytes(2**27))
    if record not in archive.namelist():
      archive.writestr(record, bytes(2**27))
  message = refused(tmp_path / "x.pth")
  assert "134 MB" in message or "is no text" in message


def test_a_compressed_checkpoint_is_read(tmp_path: pathlib.Path):
  values = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
  path = save(tmp_path / "x.pth", {"a": Tensor(values)}, compression=zipfile.ZIP_DEFLATED)
  np.testing.assert_array_equal(read_pth(path)["a"], values)


def test_records_within_each_other_and_twice_are_damage(tmp_path: pathlib.Path):
  whole = save(tmp_path / "x.pth", {"a": Tensor(np.zeros(50, np.float32), key="0")}).read_bytes()
  directory = whole.index(b"PK\x01\x02")
  entries = whole[directory:].split(b"PK\x01\x02")
  first, second = whole[directory + 42 : directory + 46], directory + len(entries[1]) + 4 + 42
  (tmp_path / "x.pth").write_bytes(whole[:second] + first + whole[second + 4 :])
  assert "within each other" in refused(tmp_path / "x.pth")
  with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
    for _ in range(2):
      archive.writestr("archive/data.pkl", b"\x80\x02}.")
  assert "two records of one name" in refused(tmp_path / "x.pth")


def test_an_archive_of_a_million_records_is_not_listed(tmp_path: pathlib.Path):
  end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 100 * 2**20, 0, 0)
  (tmp_path / "x.pth").write_bytes(b"PK\x03\x04" + bytes(1000) + end)
  assert "104857600 bytes, which no file of torch has" in refused(tmp_path / "x.pth")


def doubled(begin: bytes, again: bytes) -> Raw:
  """A container that has the one before twice, sixty times over."""
  return Raw(begin + b"".join(b"q" + bytes([i]) + again.replace(b"?", bytes([i])) for i in range(60)))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (Raw(b"}" + pickled("a") + doubled(b"]", b"0](h?h?e") + b"s"), "nested or repeated"),
    (Raw(b"}" + doubled(b")", b"0h?h?\x86") + pickled(1) + b"s"), "tuple as a key"),
    (Raw(b"}" + pickled("a") + b"]" * 100_000 + b"a" * 99_999 + b"s"), "nested or repeated"),
    (Raw(b"}" * 4_000_000), "more objects than"),
    (Raw(b"}r\xff\xff\xff\x7f" + b"j\xff\xff\xff\x7f0"), "it has nothing"),  # a place in a table of 2^31
    (Raw(b"\x8d" + b"\xff" * 7 + b"\x00"), "cut short"),  # a text of 2^56 bytes
    (Raw(b"\x96" + b"\xff" * 7 + b"\x00"), "cut short"),
    (Raw(b"\x8b\xff\xff\xff\x7f"), "cut short"),
    (Raw(b"(" * 1000 + b"1" * 2000), "is damaged"),
    ({"a": Tensor(ONE, shape=(2**70,), stride=(0,))}, "malformed tensor"),
    ({"a": Tensor(ONE, shape=(-1,), stride=(1,))}, "malformed tensor"),
    ({"a": Tensor(ONE, shape=(1,) * 70, stride=(1,) * 70)}, "malformed tensor"),
    ({"a": call(name("torch._utils", "_rebuild_tensor_v2"), 1)}, "is damaged"),
    ({"a": call(name("torch", "Size"), "abc")}, "malformed torch.Size"),
    ({"a": call(name("builtins", "eval"), "1")}, "contains builtins.eval"),
    ({"a": call(name("os", "system"), "exit")}, "contains os.system"),
    ({"a\x1b[2J\n": Tensor(ONE)}, r"it has a\x1b[2J\n"),
    ({"x" * 2000: 1, "y": Tensor(ONE, shape=(5,), stride=(1,))}, "beyond its storage"),
  ],
)  # fmt: skip
def test_pickles_that_nobody_saves_are_refused(tmp_path: pathlib.Path, content: object, message: str):
  assert message in refused(save(tmp_path / "x.pth", content))


def test_a_pickle_cannot_change_what_reads_it(tmp_path: pathlib.Path):
  """BUILD with a state for slots sets attributes of a function, where Python's own unpickler is used."""
  before = storages._rebuild.__defaults__, storages._rebuild.__code__, dict(vars(storages._rebuild))
  rebuild = name("torch._utils", "_rebuild_tensor_v2")
  for state in ({"__wrapped__": 1}, (None, {"__defaults__": (1,), "__kwdefaults__": {}})):
    content = {"a": Raw(rebuild + pickled(state) + b"b"), "b": Tensor(np.arange(3, dtype=np.float32))}
    again = read_pth(save(tmp_path / "x.pth", content))
    np.testing.assert_array_equal(again["b"], [0, 1, 2])
  assert before == (storages._rebuild.__defaults__, storages._rebuild.__code__, dict(vars(storages._rebuild)))
  path = save(tmp_path / "x.pth", {"a": Raw(name("collections", "OrderedDict") + pickled({"x": 1}) + b"b")})
  open_pth(path)
  assert not hasattr(dict, "x")


@pytest.mark.parametrize(
  ("kind", "change", "message"),
  [
    ("hf_dinov3", {"num_hidden_layers": 10**9}, "depth=1000000000: cannot be"),
    ("hf_dinov3", {"hidden_size": 2 * 10**9}, "width=2000000000: cannot be"),
    ("hf_dinov3", {"num_register_tokens": 10**12}, "num_registers=1000000000000: cannot be"),
    ("hf_dinov3", {"intermediate_size": 10**9}, "mlp_hidden=1000000000: cannot be"),
    ("hf_dinov3", {"patch_size": 10**9}, "patch_size=1000000000: cannot be"),
    ("hf_dinov3", {"num_attention_heads": 0}, "num_heads=0: must be a whole number from 1 on"),
    ("hf_dinov3", {"hidden_size": "32"}, "width='32': must be a whole number"),
    ("hf_dinov3", {"hidden_size": None}, "width=None: must be a whole number"),
    ("hf_dinov3", {"layer_norm_eps": [1]}, r"norm_eps=\[1\]: must be a number"),
    ("hf_dinov3", {"rope_theta": "x"}, "rope.base='x': must be a number"),
    ("hf_dinov3", {"rope_theta": None}, "make no VisionTransformer: give either rope.base"),
    ("hf_dinov2", {"image_size": 10**12}, "position_table.grid=.*: cannot be"),
    ("hf_dinov2", {"image_size": [8, 8, 8]}, "config.json"),
    ("hf_dinov2", {"mlp_ratio": "x"}, "config.json"),
    ("hf_dinov3_convnext", {"depths": [10**9, 1, 1, 1]}, "depths=1000000000: cannot be"),
    ("hf_dinov3_convnext", {"depths": [1] * 5000, "hidden_sizes": [1] * 5000}, "depths of 5000 stages"),
    ("hf_dinov3_convnext", {"depths": 3}, "config.json"),
  ],
)
def test_a_configuration_is_compared_with_the_file_before_it_is_built(
  tmp_path: pathlib.Path, kind: str, change: dict, message: str
):
  path, *_ = saved(tmp_path, kind)
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(config | change))
  tracemalloc.start()
  with pytest.raises(WeightsError, match=message) as caught:
    vit_jax.load_model(path)
  assert tracemalloc.get_traced_memory()[1] < MUCH
  tracemalloc.stop()
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model_type": ' + "9" * 5000 + "}", "[]", "\ufeff{}", '"x"'])
def test_json_of_any_kind_is_refused_in_a_line(tmp_path: pathlib.Path, text: str):
  path, *_ = saved(tmp_path, "hf_dinov3")
  (path / "config.json").write_text(text)
  refused(path / "config.json", lambda config: open_weights(config.parent))


def test_numbers_of_blocks_and_stages_are_counted_not_believed(tmp_path: pathlib.Path):
  state = {key: Tensor(value) for key, value in weights_of_dinov2().items()}
  state |= {"blocks.99999999999.norm1.weight": Tensor(np.ones(32, np.float32))}
  with pytest.raises(WeightsError, match=r"x\.pth: depth=100000000000: cannot be"):
    vit_jax.load_model(save(tmp_path / "x.pth", state))
  path, tensors, write = saved(tmp_path, "dinov3_convnext")
  write(tensors | {"stages.99999999999.0.gamma": ONE})
  assert "a stage 99999999999" in refused(path)


def test_files_of_an_index_are_files_beside_it(tmp_path: pathlib.Path):
  path = tmp_path / "m"
  vit_jax.save_model(path, DINOV3, random_params(DINOV3), max_shard_size=40_000)
  places = json.loads((path / INDEX).read_text())["weight_map"]
  for outside in ("../secret.safetensors", "/etc/passwd", ".."):
    (path / INDEX).write_text(json.dumps({"weight_map": places | {next(iter(places)): outside}}))
    assert "is not a file beside it" in refused(path / INDEX, lambda index: open_weights(index.parent))


def test_claims_of_a_safetensors_header_are_compared_with_the_file(tmp_path: pathlib.Path):
  path = tmp_path / "x.safetensors"
  for entry in (
    {"shape": [2**40], "data_offsets": [0, 2**42]},
    {"shape": [2**62, 4], "data_offsets": [0, 4]},
    {"shape": [1], "data_offsets": [2**60, 2**60 + 4]},
    {"shape": [2], "data_offsets": [0, 4]},
  ):
    header = json.dumps({"a": {"dtype": "F32"} | entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "not a readable safetensors" in refused(path)
  path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
  assert "its header is too long" in refused(path)


def test_a_distributed_checkpoint_stays_in_its_folder(tmp_path: pathlib.Path):
  state = weights_of_dinov2()
  for number, (fields, message) in enumerate((
    ({"relative_path": "../x.distcp"}, "is not in the folder"),
    ({"relative_path": "/etc/passwd"}, "is not in the folder"),
    ({"relative_path": "__7_0.distcp"}, "lacks 1 of the files"),
    ({"length": 10**12}, "is cut short"),
    ({"offset": -5}, "is cut short"),
    ({"offset": "0"}, "says of a chunk no place"),
    ({"transform_descriptors": ["zstd"]}, "compressed or encrypted"),
  )):  # fmt: skip
    folder = tmp_path / f"step{number}"
    save_distributed(folder, state, rows=100, **fields)
    assert message in refused(folder)


def test_chunks_of_a_tensor_leave_no_gap_and_no_overlap(tmp_path: pathlib.Path):
  save_distributed(tmp_path / "a", {"a": np.zeros((6, 2), np.float32)})
  metadata = (tmp_path / "a" / ".metadata").read_bytes()
  size = lambda *shape: bytes(call(name("torch", "Size"), shape))  # noqa: E731
  assert metadata.count(size(3, 0)) == 2  # the second chunk, and where it is
  for wrong in (size(2, 0), size(4, 0), size(0, 0)):
    (tmp_path / "a" / ".metadata").write_bytes(metadata.replace(size(3, 0), wrong))
    assert "are missing, or lie over each other" in refused(tmp_path / "a")
  (tmp_path / "a" / ".metadata").write_bytes(metadata.replace(size(6, 2), size(2**40, 2)))
  assert "are missing, or lie over each other" in refused(tmp_path / "a")


def test_a_whole_pickled_model_is_refused_with_the_way_out(tmp_path: pathlib.Path):
  module = made(name("vision.models", "Vit"), {"training": True})
  message = refused(save(tmp_path / "x.pth", module))
  assert "a whole pickled object (vision.models.Vit)" in message and ".state_dict(), NEW)" in message
  message = refused(save(tmp_path / "x.pth", {"model": module, "epoch": 3}))
  assert "model (vision.models.Vit)" in message


@pytest.mark.parametrize("kind", ["zip", "old", "distributed", "safetensors"])
def test_no_change_of_a_file_is_another_error(tmp_path: pathlib.Path, kind: str):
  """Bits flipped, bytes lost, repeated and cut: it opens, or the error is a line of the kind that is promised."""
  state, rng = weights_of_dinov2(), random.Random(0)
  nested = {"teacher": {f"backbone.{key}": Tensor(value) for key, value in state.items()}}
  path = file = tmp_path / "x.pth"
  if kind == "zip":
    save(path, nested)
  elif kind == "old":
    save_old(path, nested)
  elif kind == "safetensors":
    path = file = saved(tmp_path, "timm")[0]
  else:
    path, file = tmp_path / "step", tmp_path / "step" / ".metadata"
    save_distributed(path, state, rows=100)
  whole, opened = file.read_bytes(), 0
  for _ in range(120):
    file.write_bytes(changed(whole, rng))
    try:
      for tensor in open_weights(path).tensors["backbone"].values():
        np.asarray(tensor)
      opened += 1
    except WeightsError as error:
      assert path.name in str(error) and "\n" not in str(error)
  assert opened < 100


def changed(whole: bytes, rng: random.Random) -> bytes:
  """A file that something happened to, most often at its beginning or end, where its structure is."""
  near = rng.choice([len(whole), min(len(whole), 5000)])
  at = rng.choice([rng.randrange(near), len(whole) - 1 - rng.randrange(near)])
  kind = rng.randrange(4)
  if kind == 0:
    return whole[:at]
  if kind == 1:
    return whole[:at] + whole[at + rng.randrange(1, 50) :]
  if kind == 2:
    return whole[:at] + whole[at : at + 30] + whole[at:]
  out = io.BytesIO(whole)
  out.seek(at)
  out.write(bytes([whole[at] ^ 1 << rng.randrange(8)]))
  return out.getvalue()


@pytest.mark.parametrize(
  "content",
  [
    "[" * 100_000, "[]", "{}", '"x"',
    *(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224} | change) for change in (
      {"image_mean": ["x"] * 3}, {"image_std": [0, 1, 1]}, {"image_mean": 10**400}, {"image_std": None},
      {"size": -1}, {"size": 10**12}, {"size": {"height": "x"}}, {"size": [[]]}, {"resample": [1], "size": "x"},
    )),
  ],
)  # fmt: skip
def test_what_is_said_of_images_makes_sense(tmp_path: pathlib.Path, content: str):
  path, *_ = saved(tmp_path, "hf_dinov3")
  (path / "preprocessor_config.json").write_text(content)
  with pytest.raises(WeightsError) as caught:
    hub.load_preprocessing(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
