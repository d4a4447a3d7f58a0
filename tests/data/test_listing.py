"""Walks of folders: no single entry ends them or takes others with it, and each that is left out is named."""

import logging
import os
import pickle
import socket
import subprocess
import time

import pytest

from tests.data import pictures
from vit_jax.data import listing
from vit_jax.data.sources import open_source, rescan

PNG = pictures.encoded(pictures.smooth(8, 8), "PNG")


def put(root, *names, data=PNG):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)


def names(source, root):
  return [source.describe(i).removeprefix(f"{root}/") for i in range(len(source))]


def counts(source):
  return {reason: found.count for reason, found in source.left_out.items()}


@pytest.fixture
def root(tmp_path):
  put(tmp_path / "set", *(f"{kind}/{i}.png" for kind in ("ant", "bee", "cow") for i in range(3)))
  return tmp_path / "set"


ALL = [f"{kind}/{i}.png" for kind in ("ant", "bee", "cow") for i in range(3)]


def loop(root):
  (root / "bee/latest").symlink_to("latest")


def two_links(root):
  (root / "bee/a.png").symlink_to("b.png")
  (root / "bee/b.png").symlink_to("a.png")


def nothing(root):
  (root / "bee/0gone.png").symlink_to("/nowhere/at/all.png")


def through_a_file(root):
  (root / "bee/x.png").symlink_to("0.png/inside.png")


def folder_loop(root):
  (root / "bee/again").symlink_to(root, target_is_directory=True)


def pipe(root):
  os.mkfifo(root / "bee/pipe.png")


def unix_socket(root):
  here = os.open(root / "bee", os.O_RDONLY)  # the address of a socket is short
  with socket.socket(socket.AF_UNIX) as one:
    one.bind(f"/proc/self/fd/{here}/s.png")
  os.close(here)


def device(root):
  (root / "bee/zero.jpg").symlink_to("/dev/zero")


def long_link(root):
  (root / "bee/long.png").symlink_to("x/" * 2000 + "y.png")


def of_a_system(root):
  put(root, "@eaDir/0.png/SYNOFILE_THUMB_M.jpg", "bee/__MACOSX/._0.png")  # each would be one more class or image


def hidden(root):
  put(root, "bee/.DS_Store", "bee/._0.png", ".git/objects/1.png")


def others(root):
  put(root, "bee/notes.txt", "bee/film.MP4", "bee/noext", "bee/a.xyz", data=b"no image")


@pytest.mark.parametrize(
  ("spoil", "expected"),
  [
    (loop, {"link that leads back to itself": ("bee/latest",)}),
    (two_links, {"link that leads back to itself": ("bee/a.png", "bee/b.png")}),
    (nothing, {"link to nothing": ("bee/0gone.png",)}),
    (through_a_file, {"link to nothing": ("bee/x.png",)}),
    (folder_loop, {"link to a folder that contains it": ("bee/again/",)}),
    (pipe, {"named pipe": ("bee/pipe.png",)}),
    (unix_socket, {"socket": ("bee/s.png",)}),
    (device, {"device": ("bee/zero.jpg",)}),
    (long_link, {"link to nothing": ("bee/long.png",)}),
    (of_a_system, {"folder of the operating system or the storage": ("@eaDir", "bee/__MACOSX")}),
    (hidden, {"hidden": (".git", "bee/.DS_Store", "bee/._0.png")}),
    (others, {
      ".txt": ("bee/notes.txt",), "no extension": ("bee/noext",), ".xyz": ("bee/a.xyz",),
      ".mp4: videos are not read: write their frames as images": ("bee/film.MP4",),
    }),
  ],
  ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_one_odd_entry_takes_no_other_with_it_and_is_named(root, spoil, expected, caplog):
  spoil(root)
  with caplog.at_level(logging.INFO):
    source = open_source(f"folder:{root}")
  assert names(source, root) == ALL and source.class_names == ("ant", "bee", "cow")
  assert {reason: tuple(sorted(found.examples)) for reason, found in source.left_out.items()} == expected
  assert all(name in caplog.text for examples in expected.values() for name in examples[:3])
  assert pickle.loads(pickle.dumps(source)).left_out == source.left_out


def test_names_that_are_no_text_are_read_and_shown(root):
  odd = os.path.join(os.fsencode(root), b"b\xff\x1b[31m")
  os.mkdir(odd)
  with open(os.path.join(odd, b"\xfe\n.png"), "wb") as file:
    file.write(PNG)
  os.symlink(b"\xfd", os.path.join(odd, b"\xfd"))
  for index in ("none", "cache"):
    source = open_source(f"folder:{root}") if index == "none" else rescan(f"folder:{root}", cache_dir=root.parent)
    assert len(source) == 10 and all(source.describe(i).isprintable() for i in range(10))
    assert source[6] == {"image": PNG, "label": 2}
    assert source.class_names == ("ant", "bee", "b\\udcff\\x1b[31m", "cow")
    assert source.left_out["link that leads back to itself"].examples == ("b\\udcff\\x1b[31m/\\udcfd",)


def test_a_tree_deeper_than_a_path_may_be_is_walked_as_far_as_paths_reach(root):
  here = os.open(root / "bee", os.O_RDONLY)
  for _ in range(2100):  # also deeper than Python calls itself
    os.mkdir("d", dir_fd=here)
    inner = os.open("d", os.O_RDONLY, dir_fd=here)
    os.close(here)
    here = inner
  os.close(here)
  try:
    source = open_source(f"folder:{root}")
    assert names(source, root) == ALL and counts(source) == {"path that is too long": 1}
  finally:  # what no path reaches, pytest cannot remove
    subprocess.run(["rm", "-r", root / "bee/d"], check=True)


def test_folders_that_link_to_each_other_end(tmp_path, monkeypatch):
  monkeypatch.setattr(listing, "_MOST_VISITS", 5)
  for a in "abcdefgh":
    put(tmp_path, f"{a}/1.png")
    for b in "abcdefgh":
      (tmp_path / a / f"to_{b}").symlink_to(tmp_path / b, target_is_directory=True)
  source = open_source(f"folder:{tmp_path}")
  assert len(source) <= 8 * 6 and {f"{a}/1.png" for a in "abcdefgh"} <= set(names(source, tmp_path))
  assert any("other links lead to" in reason for reason in source.left_out)


def test_a_folder_that_cannot_be_listed_to_its_end_gives_what_came_before(root, monkeypatch):
  original = os.scandir

  class Torn:
    def __init__(self, path):
      self.entries, self.torn = original(path), str(path).endswith("bee/")

    def __enter__(self):
      return self

    def __exit__(self, *_):
      self.entries.close()

    def __iter__(self):
      for i, entry in enumerate(self.entries):
        if self.torn and i == 1:
          raise OSError(5, "Input/output error")
        yield entry

  monkeypatch.setattr(listing.os, "scandir", Torn)
  source = open_source(f"folder:{root}")
  assert [name.partition("/")[0] for name in names(source, root)].count("bee") == 1 and len(source) == 7
  assert counts(source) == {"not readable (Input/output error)": 1}


def test_a_folder_without_permission_is_named(root, monkeypatch):
  original = os.scandir

  def refuse(path):
    if str(path).endswith("bee/"):
      raise PermissionError(13, "Permission denied", path)
    return original(path)

  monkeypatch.setattr(listing.os, "scandir", refuse)
  source = open_source(f"folder:{root}")
  assert len(source) == 6 and source.left_out["without permission to read it"].examples == ("bee/",)


def test_the_index_remembers_what_is_left_out_and_looks_at_it_again(root, tmp_path, monkeypatch):
  (root / "bee/9.png").symlink_to(tmp_path / "elsewhere.png")
  past = time.time() - 100
  for folder, _, _ in os.walk(root):
    os.utime(folder, (past, past))
  first = rescan(f"folder:{root}", cache_dir=tmp_path / "cache")
  monkeypatch.setattr(listing, "list_local", lambda root: pytest.fail("listed again"))
  again = open_source(f"folder:{root}", cache_dir=tmp_path / "cache")
  assert again.left_out == first.left_out and counts(again) == {"link to nothing": 1}
  monkeypatch.undo()
  (tmp_path / "elsewhere.png").write_bytes(PNG)  # changes no folder below the root
  assert len(open_source(f"folder:{root}", cache_dir=tmp_path / "cache")) == 10


def test_images_whose_names_do_not_say_so_are_found_by_their_content(tmp_path):
  put(tmp_path, "a/1a2b3c", "a/photo.jpg_large", "a/2024.01.02", "a/photo.jpg!d", "a/x.png.1")
  put(tmp_path, "a/README", "a/BMI", "a/empty", "a/P1", data=b"")
  (tmp_path / "a/BMI").write_bytes(b"BM is no bitmap")
  (tmp_path / "a/P1").write_bytes(b"P1 is no bitmap either")
  source = open_source(f"folder:{tmp_path}")
  assert names(source, tmp_path) == ["a/1a2b3c", "a/2024.01.02", "a/photo.jpg!d", "a/photo.jpg_large", "a/x.png.1"]
  assert counts(source) == {"no extension": 4}


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("x-00.array_record", "Did you mean array_record:ROOT/\\*.array_record\\*?"),
    ("deep/er/part.parquet", "Did you mean parquet:ROOT/deep/er/\\*.parquet?"),
    ("0000.tar", "Did you mean tar:ROOT/\\*.tar?"),
    ("train-images-idx3-ubyte.gz", "idx files, as of MNIST, are not read"),
    ("t10k-images-idx3-ubyte", "idx files, as of MNIST, are not read"),
    ("clip.mp4", "videos are not read: write their frames as images"),
    ("all.tar.gz", "packed files are not read: unpack them"),
    ("x.tfrecord-00000-of-00001", "as tfds:"),
    ("scan.dcm", "not a format that is read"),
  ],
)
def test_what_a_folder_holds_instead_of_images_is_told_with_what_reads_it(tmp_path, name, says):
  put(tmp_path, name, data=b"x")
  with pytest.raises(ValueError, match=says.replace("ROOT", str(tmp_path)).replace("?", "\\?")):
    open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize(
  ("spec", "name", "meant"),
  [
    ("tar:{}", "a.tar", "tar:{}/*.tar"),
    ("parquet:{}", "train-00000-of-00002.parquet", "parquet:{}/*.parquet"),
    ("tar:{}/*.tar", "a.parquet", "parquet:{}/*.parquet"),
    ("array_record:{}", "x.array_record-00000-of-00002", "array_record:{}/*.array_record*"),
  ],
)
def test_a_folder_of_shards_is_told_the_pattern(tmp_path, spec, name, meant):
  (tmp_path / name).touch()
  with pytest.raises(ValueError, match="no file matches .* Did you mean .*") as refused:
    open_source(spec.format(tmp_path))
  assert str(refused.value).endswith(f" Did you mean {meant.format(tmp_path)}?")


def test_shards_of_a_prepared_dataset_and_a_shard_itself_are_told(tmp_path):
  put(tmp_path, "mnist-train.array_record-00000-of-00001", "dataset_info.json", data=b"x")
  with pytest.raises(ValueError, match=f"Did you mean tfds:{tmp_path}/train\\?"):
    open_source(f"folder:{tmp_path}")
  put(tmp_path, "a.tar", data=b"x")
  with pytest.raises(ValueError, match=f"is a file.* Did you mean tar:{tmp_path}/a.tar\\?"):
    open_source(f"folder:{tmp_path}/a.tar")
  put(tmp_path, "film.mp4", data=b"x")
  with pytest.raises(ValueError, match="film.mp4 is a file .videos are not read"):
    open_source(f"folder:{tmp_path}/film.mp4")
  with pytest.raises(ValueError, match=f"no scheme. Did you mean tar:{tmp_path}/a.tar\\?"):
    open_source(f"{tmp_path}/a.tar")
