"""PyTorch files without PyTorch."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from vit_jax.weights import WeightsError
from vit_jax.weights.pickles import Foreign
from vit_jax.weights.pth import read_pth, write_pth

TYPES = pathlib.Path(__file__).parent / "data" / "types.pth"


def test_a_file_written_by_torch_is_read_exactly():
  content = read_pth(TYPES)
  for name, values in content["types"].items():
    assert values.dtype == np.dtype(getattr(ml_dtypes, name, name))
    np.testing.assert_array_equal(values.astype(np.float64), [0, 1, 1 if name == "bool" else 2])
  assert len(content["types"]) == 8
  base = np.arange(6, dtype=np.float32).reshape(2, 3)
  np.testing.assert_array_equal(content["transposed"], base.T)
  np.testing.assert_array_equal(content["row"], base[1])
  assert content["scalar"].shape == () and content["scalar"] == 2.5
  assert content["empty"].shape == (0, 4)
  np.testing.assert_array_equal(content["parameter"], [1, 1])
  np.testing.assert_array_equal(content["module"]["weight"], [[0.5, -1.0]])
  assert content["plain"] == {"step": 3, "names": ["a", "b"], "nothing": None, "size": (1, 2)}


def test_what_is_written_is_read_back(tmp_path: pathlib.Path):
  rng = np.random.default_rng(0)
  state = {
    "kernel": rng.normal(size=(3, 4)).astype(np.float32).T,
    "half": np.arange(3, dtype=ml_dtypes.bfloat16),
    "scalar": np.float64(0.1),
    "flag": np.array([True, False]),
  }
  write_pth(tmp_path / "x.pth", state)
  again = read_pth(tmp_path / "x.pth")
  assert list(again) == list(state)
  for name, value in state.items():
    assert again[name].dtype == value.dtype and again[name].shape == value.shape
    np.testing.assert_array_equal(again[name], value)
  with pytest.raises(WeightsError, match="z is complex128"):
    write_pth(tmp_path / "y.pth", {"z": np.zeros(1, np.complex128)})


def test_torch_reads_what_is_written(tmp_path: pathlib.Path):
  torch = pytest.importorskip("torch")
  write_pth(tmp_path / "x.pth", {"a": np.arange(6.0).reshape(2, 3).T, "b": np.ones(2, ml_dtypes.bfloat16)})
  again = torch.load(tmp_path / "x.pth", weights_only=True)
  assert again["a"].tolist() == [[0, 3], [1, 4], [2, 5]] and again["a"].dtype == torch.float64
  assert again["b"].dtype == torch.bfloat16


class Malicious:
  def __reduce__(self):
    return print, ("the pickle ran code",)


def archive(path: pathlib.Path, content: object) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("x/data.pkl", pickle.dumps(content, protocol=2))
  return path


def test_a_pickle_that_would_run_code_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
  for content in (Malicious(), {"step": Malicious()}):
    with pytest.raises(WeightsError, match=r"x\.pth cannot be read: it contains builtins\.print; only tensors"):
      read_pth(archive(tmp_path / "x.pth", content))
  assert capsys.readouterr().out == ""


def test_objects_of_others_stand_for_themselves(tmp_path: pathlib.Path):
  given = argparse.Namespace(arch="vit_small")
  content = {"step": np.float64(1.0), "path": pathlib.PurePosixPath("x"), "args": given, "seen": {1, 2}}
  content |= {"counts": collections.Counter("aab"), "when": datetime.date(2026, 1, 1), "n": {(0, 1): [None, True, 2.5]}}
  found = read_pth(archive(tmp_path / "x.pth", content))
  names = {key: str(value) for key, value in found.items() if isinstance(value, Foreign)}
  assert names.keys() == {"step", "path", "args", "counts", "when"}
  assert names["step"].startswith("numpy.") and names["step"].endswith("multiarray.scalar")
  assert names["args"] == "argparse.Namespace" and found["args"].state == {"arch": "vit_small"}
  assert names["path"] == "pathlib.PurePosixPath" and names["when"] == "datetime.date"
  assert sorted(found["seen"]) == [1, 2] and found["n"] == {(0, 1): [None, True, 2.5]}


def test_broken_files_are_named(tmp_path: pathlib.Path):
  content = TYPES.read_bytes()
  path = tmp_path / "x.pth"
  for damaged in (content[: len(content) // 2], b"", pickle.dumps({"old": 1})):
    path.write_bytes(damaged)
    with pytest.raises(WeightsError, match=r"x\.pth is not a PyTorch file"):
      read_pth(path)
  storage = content.index(np.arange(6, dtype=np.float32).tobytes())
  path.write_bytes(content[:storage] + b"\x01" + content[storage + 1 :])
  with pytest.raises(WeightsError, match=r"x\.pth cannot be read: .*CRC"):
    read_pth(path)
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("readme.txt", "hello")
  with pytest.raises(WeightsError, match="not one written by torch.save"):
    read_pth(path)
  with pytest.raises(FileNotFoundError, match="no file"):
    read_pth(tmp_path / "none.pth")


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path: pathlib.Path):
  write_pth(tmp_path / "x.pth", {"a": np.zeros(4, np.float32)})
  with zipfile.ZipFile(tmp_path / "x.pth") as file:
    parts = {name: file.read(name) for name in file.namelist()}
  pickled = parts["archive/data.pkl"]
  size = pickled.rindex(b"(J\x04\x00\x00\x00t")  # the shape (4,)
  parts["archive/data.pkl"] = pickled[:size] + b"(J\x05\x00\x00\x00t" + pickled[size + 7 :]
  with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
    for name, part in parts.items():
      file.writestr(name, part)
  with pytest.raises(WeightsError, match="reaches beyond its storage of 4"):
    read_pth(tmp_path / "x.pth")
