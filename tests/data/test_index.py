"""Index files, and folders that are opened by one."""

import hashlib
import os
import pickle
import time

import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data import folder as folders
from vit_jax.data.index import Names, index_path, read_index, write_index
from vit_jax.data.sources import open_source, rescan

PNG = pictures.encoded(pictures.smooth(8, 8), "PNG")


def test_arrays_and_what_is_said_about_them_come_back(tmp_path):
  arrays = {"a": np.arange(7, dtype=np.int32), "none": np.empty((0, 3)), "b": np.ones((3, 2), np.float64)}
  write_index(tmp_path / "x" / "y.index", {"of": "Zürich"}, arrays)
  about, read = read_index(tmp_path / "x" / "y.index")
  assert about == {"of": "Zürich"}
  for name, array in arrays.items():
    np.testing.assert_array_equal(read[name], array)
    assert read[name].dtype == array.dtype
  assert list((tmp_path / "x").iterdir()) == [tmp_path / "x" / "y.index"]  # nothing temporary is left


@pytest.mark.parametrize("damage", [lambda data: data[:-70], lambda data: b"x" + data[1:], lambda data: data[:9]])
def test_a_damaged_index_is_refused(tmp_path, damage):
  write_index(tmp_path / "i", {}, {"a": np.arange(1000)})
  (tmp_path / "i").write_bytes(damage((tmp_path / "i").read_bytes()))
  with pytest.raises(ValueError, match="no index|ends inside"):
    read_index(tmp_path / "i")


def test_names_of_any_bytes_come_back():
  strings = ["a", "", "Zürich/1.png", os.fsdecode(b"\xff\xfe.jpg")]
  names = Names.of(strings)
  assert [names[i] for i in range(4)] == strings and names[-1] == strings[-1] and len(names) == 4


@pytest.fixture
def photos(tmp_path):
  """A folder of images that was last changed a while ago."""
  root = tmp_path / "photos"
  for name in ("a/1.png", "a/deep/er/2.png", "b/3.png"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(PNG)
  age(root)
  return root


def age(root):
  past = time.time() - 100
  for path, _, _ in os.walk(root):
    os.utime(path, (past, past))


def names(source):
  return [source.describe(i).partition("photos/")[2] for i in range(len(source))]


@pytest.fixture
def walks(monkeypatch):
  """How often folders were listed."""
  seen, original = [], folders._list_local
  monkeypatch.setattr(folders, "_list_local", lambda root: seen.append(root) or original(root))
  return seen


class TestFolderIndex:
  def test_an_indexed_folder_is_not_listed_again_and_is_the_same(self, photos, tmp_path, walks):
    listed = open_source(f"folder:{photos}", cache_dir=tmp_path)
    rescan(f"folder:{photos}", cache_dir=tmp_path)
    assert len(walks) == 2
    source = open_source(f"folder:{photos}", cache_dir=tmp_path)
    assert len(walks) == 2
    assert names(source) == names(listed) == ["a/1.png", "a/deep/er/2.png", "b/3.png"]
    assert [source[i] for i in range(3)] == [listed[i] for i in range(3)]
    assert source.class_names == ("a", "b")
    assert names(pickle.loads(pickle.dumps(source))) == names(source)

  @pytest.mark.parametrize("change", ["add", "remove", "rename", "add folder"])
  def test_a_changed_folder_is_listed_again(self, photos, tmp_path, change, caplog):
    rescan(f"folder:{photos}", cache_dir=tmp_path)
    deep = photos / "a" / "deep" / "er"
    if change == "add":
      (deep / "9.png").write_bytes(PNG)
    elif change == "remove":
      (deep / "2.png").unlink()
    elif change == "rename":
      (deep / "2.png").rename(deep / "7.png")
    else:
      (photos / "c").mkdir()
      (photos / "c" / "5.png").write_bytes(PNG)
    expected = {"add": 4, "remove": 2, "rename": 3, "add folder": 4}
    with caplog.at_level("INFO", "vit_jax"):
      source = open_source(f"folder:{photos}", cache_dir=tmp_path)
    assert len(source) == expected[change] and "no longer holds" in caplog.text
    if change == "rename":
      assert "a/deep/er/7.png" in names(source)

  def test_an_index_made_while_the_folder_changes_is_not_trusted(self, photos, tmp_path, walks):
    (photos / "b" / "4.png").write_bytes(PNG)  # within the file system's resolution of the listing
    rescan(f"folder:{photos}", cache_dir=tmp_path)
    open_source(f"folder:{photos}", cache_dir=tmp_path)
    assert len(walks) == 2

  def test_a_large_folder_is_indexed_without_being_asked(self, photos, tmp_path, monkeypatch, walks):
    monkeypatch.setattr(folders, "_INDEXED", 3)
    for _ in range(3):
      source = open_source(f"folder:{photos}", cache_dir=tmp_path / "cache")
    assert len(walks) == 1 and len(pickle.dumps(source)) < 500

  def test_an_index_beside_the_folder_goes_with_it(self, photos, tmp_path, walks):
    rescan(f"folder:{photos}", cache_dir=tmp_path / "cache", beside=True)
    assert (tmp_path / "photos.vit_jax_index").exists() and not (tmp_path / "cache").exists()
    (tmp_path / "elsewhere").mkdir()
    for name in ("photos", "photos.vit_jax_index"):
      (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    source = open_source(f"folder:{tmp_path}/elsewhere/photos", cache_dir=tmp_path / "cache")
    assert len(walks) == 1 and source[2]["image"] == PNG and "elsewhere" in source.describe(0)
    assert "elsewhere" in pickle.loads(pickle.dumps(source)).describe(0)

  def test_a_damaged_index_is_made_again(self, photos, tmp_path):
    rescan(f"folder:{photos}", cache_dir=tmp_path)
    index_path("folder", str(photos), tmp_path).write_bytes(b"nothing")
    assert len(open_source(f"folder:{photos}", cache_dir=tmp_path)) == 3

  def test_a_cache_that_cannot_be_written_costs_only_time(self, photos, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folders, "_INDEXED", 3)
    (tmp_path / "file").touch()
    assert len(open_source(f"folder:{photos}", cache_dir=tmp_path / "file")) == 3
    assert "listed at every start" in caplog.text
    with pytest.raises(OSError):
      rescan(f"folder:{photos}", cache_dir=tmp_path / "file")


def parts(path):
  """Where each part of an index file begins: magic, length, checksum, header, arrays."""
  return [0, 8, 16, 48, path.stat().st_size // 2, path.stat().st_size - 1]


@pytest.mark.parametrize("how", ["truncate", "flip", "deep", "empty", "folder", "zeros"])
def test_an_index_damaged_anywhere_is_made_again(photos, tmp_path, how):
  rescan(f"folder:{photos}", cache_dir=tmp_path)
  path = index_path("folder", str(photos), tmp_path)
  whole = path.read_bytes()
  for place in parts(path) if how in ("truncate", "flip", "zeros") else [0]:
    if how == "truncate":
      content = whole[:place]
    elif how == "flip":
      content = whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :]
    elif how == "zeros":
      content = whole[:place] + b"\0" * (len(whole) - place)
    elif how == "deep":
      text = b"[" * 100_000
      content = whole[:8] + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text
    else:
      content = b""
    path.unlink() if path.is_file() else None
    path.mkdir() if how == "folder" else path.write_bytes(content)
    if place < len(whole) // 2:
      with pytest.raises(ValueError):
        read_index(path)
    source = open_source(f"folder:{photos}", cache_dir=tmp_path)
    assert len(source) == 3
    if place < len(whole) // 2:
      assert names(source) == ["a/1.png", "a/deep/er/2.png", "b/3.png"]
