"""Parquet, tar and synthetic sources, mixtures, folders of object stores."""

import collections
import io
import json
import pickle
import tarfile
from fractions import Fraction

import fsspec
import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.mixture import is_mixture, period_shares
from vit_jax.data.order import make_order
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.sources import open_source, rescan, split_specs
from vit_jax.data.views import MultiCrop

PNG = [pictures.encoded(pictures.smooth(9, 9, i), "PNG") for i in range(12)]


def make_tar(path, members):
  """Writes (name, bytes) members; returns the path."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  path.write_bytes(file.getvalue())
  return path


class TestTar:
  def test_images_with_the_labels_beside_them_in_the_order_of_the_shards(self, tmp_path):
    long = "a-rather-long-folder-name/" * 6
    make_tar(
      tmp_path / "00.tar", [("x/0.png", PNG[0]), ("x/0.cls", b"3\n"), ("1.json", b'{"label": 1}'), ("1.PNG", PNG[1])]
    )
    make_tar(
      tmp_path / "01.tar", [(long + "2.jpg", PNG[2]), ("3.png", PNG[3]), ("3.txt", b"a caption"), ("3.cls", b"0")]
    )
    source = open_source(f"tar:{tmp_path}/{{00..01}}.tar", cache_dir=tmp_path / "cache")
    assert [source[i]["image"] for i in range(4)] == PNG[:4]
    assert source.class_names == ("0", "1", "3") and source.num_classes == 3  # class 2 has no image
    assert [source[i]["label"] for i in range(4)] == [2, 1, -1, 0]
    assert dict(source.left_out) == {".txt": (1, ("3.txt",), True)}
    assert source.describe(2) == f"{long}2.jpg in {tmp_path}/01.tar"
    again = pickle.loads(pickle.dumps(source))
    assert again[3] == source[3] and len(pickle.dumps(source)) < 1000  # the index is mapped again, not sent

  def test_names_serve_as_labels(self, tmp_path):
    make_tar(
      tmp_path / "a.tar", [("0.png", PNG[0]), ("0.cls", b"dog"), ("1.png", PNG[1]), ("1.json", b'{"class": "cat"}')]
    )
    source = open_source(f"tar:{tmp_path}/a.tar", cache_dir=tmp_path / "cache")
    assert source.class_names == ("cat", "dog") and [source[i]["label"] for i in range(2)] == [1, 0]

  def test_the_index_is_used_until_a_shard_changes(self, tmp_path, monkeypatch):
    spec, scans = f"tar:{tmp_path}/*.tar", []
    make_tar(tmp_path / "a.tar", [("0.png", PNG[0])])
    from vit_jax.data import tar

    original = tar.read_shard
    monkeypatch.setattr(tar, "read_shard", lambda path: scans.append(path) or original(path))
    for _ in range(2):
      assert len(open_source(spec, cache_dir=tmp_path / "cache")) == 1
    assert len(scans) == 1
    make_tar(tmp_path / "a.tar", [("0.png", PNG[0]), ("1.png", PNG[1])])
    assert len(open_source(spec, cache_dir=tmp_path / "cache")) == 2 and len(scans) == 2
    rescan(spec, cache_dir=tmp_path / "cache")
    assert len(scans) == 3

  def test_a_truncated_shard_gives_what_is_before_and_names_itself(self, tmp_path, caplog):
    path = make_tar(tmp_path / "a.tar", [(f"{i}.png", PNG[i]) for i in range(4)])
    path.write_bytes(path.read_bytes()[:3500])
    source = open_source(f"tar:{path}", cache_dir=tmp_path / "cache")
    good = [i for i in range(len(source)) if self.readable(source, i)]
    assert good == list(range(len(good))) and 1 <= len(good) < 4
    assert len(source) == len(good) and "a.tar" in caplog.text

  def readable(self, source, i):
    try:
      return decode(source[i]["image"]).shape == (9, 9, 3)
    except BadImage as error:
      assert "ends after" in error.reason
      return False

  def test_what_is_no_shard_is_told(self, tmp_path):
    import gzip

    whole = make_tar(tmp_path / "a.tar", [("0.txt", b"text"), ("0.seg.png", PNG[0])]).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(whole))
    (tmp_path / "c.tar").write_bytes(b"no tar file at all" * 100)
    for name, says in (
      ("a.tar", "holds no image, only what is left out: .*0.txt.*label map .seg.png, no photograph .0.seg.png"),
      ("b.tar.gz", "is compressed \\(gzip\\)"),
      ("c.tar", "c.tar is no whole tar file"),
      ("d*.tar", "no file matches .*holds a.tar, b.tar.gz, c.tar"),
    ):
      with pytest.raises(ValueError, match=says):
        open_source(f"tar:{tmp_path}/{name}", cache_dir=tmp_path / "cache")


def make_parquet(path, count, rows_per_group=4, *, kind="struct", names=("cat", "dog"), first=0):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  images = [PNG[(first + i) % 12] for i in range(count)]
  if kind == "struct":
    column = pa.array([{"bytes": image, "path": None} for image in images])
  elif kind == "path":
    for i, image in enumerate(images):
      (path.parent / f"{i}.png").write_bytes(image)
    column = pa.array([{"bytes": None, "path": f"{i}.png"} for i in range(count)])
    column = column.cast(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
  else:
    column = pa.array(images, pa.large_binary())
  table = pa.table({"id": pa.array(range(count)), "image": column, "label": pa.array([i % 2 for i in range(count)])})
  if names:
    info = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
  pq.write_table(table, path, row_group_size=rows_per_group)
  return path


class TestParquet:
  @pytest.mark.parametrize("kind", ["struct", "path", "binary"])
  def test_every_kind_of_image_column(self, tmp_path, kind):
    make_parquet(tmp_path / "a.parquet", 6, kind=kind)
    source = open_source(f"parquet:{tmp_path}/*.parquet" + ("?paths=below" if kind == "path" else ""))
    assert [source[i]["image"] for i in (5, 0, 3)] == [PNG[5], PNG[0], PNG[3]]
    assert [source[i]["label"] for i in range(6)] == [0, 1] * 3
    assert source.class_names == ("cat", "dog") and source.num_classes == 2
    assert source.describe(5) == f"row 1 of row group 1 of {tmp_path}/a.parquet"
    assert pickle.loads(pickle.dumps(source))[4] == source[4]

  def test_labels_without_names_and_with_names_as_values(self, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_parquet(tmp_path / "a.parquet", 6, names=())
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    assert source.num_classes == 2 and source.class_names == ("0", "1")
    table = {"img": pa.array(PNG[:3], pa.binary()), "kind": pa.array(["dog", None, "ant"]), "raw": pa.array([b""] * 3)}
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    source = open_source(f"parquet:{tmp_path}/b.parquet?label=kind")
    assert source.class_names == ("ant", "dog") and [source[i]["label"] for i in range(3)] == [1, -1, 0]
    assert open_source(f"parquet:{tmp_path}/b.parquet")[0] == {"image": PNG[0], "label": -1}

  def test_memory_is_bounded_and_each_row_group_is_read_once_an_epoch(self, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    noise = [rng.bytes(1 << 18) for _ in range(32)]  # four to the megabyte: eight row groups of one
    pq.write_table(pa.table({"image": pa.array(noise, pa.binary())}), tmp_path / "a.parquet", row_group_size=4)
    source = open_source(f"parquet:{tmp_path}/a.parquet?window_mb=3&cache_mb=3")
    assert source.window == 2 and len(source.blocks) == 9
    order = make_order(source, seed=5)
    reads, kept = collections.Counter(), []
    for record in order(np.arange(64)):
      group = int(record) // 4
      reads[group] += group not in source._cache
      source[int(record)]
      kept.append(sum(table.nbytes for table in source._tables()))
    assert max(kept) <= 3 << 20
    assert all(1 <= reads[group] <= 2 for group in range(8))  # two epochs; a window may go on into the next

  def test_every_record_comes_once_an_epoch_and_epochs_differ(self, tmp_path):
    make_parquet(tmp_path / "a.parquet", 10)
    make_parquet(tmp_path / "b.parquet", 9)
    source = open_source(f"parquet:{tmp_path}/*.parquet")
    source.window = 2
    order = make_order(source, seed=5)
    epochs = order(np.arange(57)).reshape(3, 19)
    assert all(sorted(epoch) == list(range(19)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    np.testing.assert_array_equal(order(np.arange(20, 31)), epochs.ravel()[20:31])  # from anywhere
    assert "blocks" in order.identity and set(order.alternatives(5)) == {4, 5, 6, 7}
    source.window = 99
    assert make_order(source, seed=5).identity == {}  # small enough to be shuffled as a whole

  def test_what_is_missing_is_told(self, tmp_path):
    make_parquet(tmp_path / "a.parquet", 4)
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind" * 9)
    for rest, says in (
      ("b*.parquet", "no file matches .*holds a.parquet, x.parquet"),
      ("x.parquet", "x.parquet is no whole Parquet file"),
      ("a.parquet?image=id", "'id' is no column of images; the columns: id .int64., image"),
      ("a.parquet?label=lable", "no column 'lable'; the columns: id, image, label"),
      ("a.parquet?window=3", "unknown option window; valid: image, label, paths, window_mb, cache_mb"),
      ("a.parquet?cache_mb=x", "cache_mb=x must be a whole number"),
    ):
      with pytest.raises(ValueError, match=says):
        open_source(f"parquet:{tmp_path}/{rest}")


class TestSynthetic:
  @pytest.mark.parametrize("kind", ["noise", "gradient", "photo"])
  @pytest.mark.parametrize("format", ["jpeg", "png", "webp", "none"])
  def test_images_of_the_size_and_number_asked_for(self, kind, format):
    source = open_source(f"synthetic:{kind}?size=40x30&count=7&format={format}&classes=3&distinct=5")
    assert len(source) == 7 and source.num_classes == 3 and source[5]["label"] == 2
    pixels = [decode(source[i]["image"]) for i in range(7)]
    assert all(image.shape == (30, 40, 3) for image in pixels)
    assert (pixels[0] == pixels[5]).all() and (pixels[0] != pixels[1]).any() and pixels[0].std() > 1

  def test_an_image_is_the_same_everywhere(self):
    source = open_source("synthetic:noise?size=8&count=4&format=none")
    again = pickle.loads(pickle.dumps(open_source("synthetic:noise?size=8&count=99&format=none")))
    np.testing.assert_array_equal(source[3]["image"], again[3]["image"])
    assert source[0]["label"] == -1 and source.num_classes == 0

  @pytest.mark.parametrize(
    ("rest", "says"),
    [
      ("fog", "no kind 'fog'; the kinds are noise"),
      ("noise?siz=3", "unknown option siz"),
      ("noise?size=0", "size=0 must"),
      ("noise?count=0", "count=0 must be"),
      ("noise?format=gif", "format=gif is not one of jpeg"),
    ],
  )
  def test_mistakes_are_explained(self, rest, says):
    with pytest.raises(ValueError, match=says):
      open_source(f"synthetic:{rest}")


def make_folder(root, classes):
  """Writes PNG files; classes: {sub-folder or "": how many}."""
  for name, count in classes.items():
    (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
      (root / name / f"{i}.png").write_bytes(PNG[i % 12])
  return root


class TestMixture:
  @pytest.fixture
  def source(self, tmp_path):
    make_folder(tmp_path / "a", {"cat": 3, "dog": 4})
    make_folder(tmp_path / "b", {"ant": 2, "dog": 3})
    return open_source(f"0.7 folder:{tmp_path}/a + 0.3 folder:{tmp_path}/b")

  def test_its_records_are_those_of_its_parts_with_joint_classes(self, source, tmp_path):
    assert len(source) == 12 and source.class_names == ("ant", "cat", "dog")
    assert [source[i]["label"] for i in range(12)] == [1] * 3 + [2] * 4 + [0] * 2 + [2] * 3
    assert source.describe(7) == f"{tmp_path}/b/ant/0.png"

  def test_shares_are_exact_and_each_part_has_exact_epochs(self, source):
    records = make_order(source, seed=1)(np.arange(700))
    of_a = records < 7
    assert all(of_a[i : i + 10].sum() == 7 for i in range(0, 700, 10))
    for mine, size in ((records[of_a], 7), (records[~of_a] - 7, 5)):
      epochs = mine[: len(mine) // size * size].reshape(-1, size)
      assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
      assert len({tuple(epoch) for epoch in epochs}) > 20
    assert len({tuple(of_a[i : i + 10]) for i in range(0, 700, 10)}) > 20  # no fixed rhythm

  def test_any_element_is_known_without_those_before(self, source):
    order = make_order(source, seed=1)
    whole = order(np.arange(100))
    parts = [make_order(source, 1)(np.arange(i, i + 5)) for i in range(0, 100, 5)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(make_order(source, seed=2)(np.arange(100)), whole)

  def test_a_run_resumes_exactly_and_other_weights_are_refused(self, source, tmp_path):
    views = MultiCrop(global_size=8, local_size=8, local_number=1, mask_grid=(2, 2))

    def pipeline(of):
      return make_pipeline(of, views, batch_size=8, seed=3, workers=0)

    with pipeline(source) as whole:
      first = [next(whole) for _ in range(2)]
      state = json.loads(json.dumps(whole.get_state()))
      rest = [next(whole) for _ in range(3)]
    with pipeline(pickle.loads(pickle.dumps(source))) as resumed:
      resumed.set_state(state)
      for batch in rest:
        for key, array in next(resumed).items():
          np.testing.assert_array_equal(array, batch[key])
    assert any((batch["label"] != first[0]["label"]).any() for batch in rest)
    other = open_source(f"0.6 folder:{tmp_path}/a + 0.4 folder:{tmp_path}/b")
    with pipeline(other) as refused, pytest.raises(ValueError, match="mixture 7 of 7 . 3 of 5 -> 3 of 7 . 2 of 5"):
      refused.set_state(state)

  def test_what_replaces_a_record_is_of_the_same_part(self, source):
    order = make_order(source, seed=1)
    assert order.alternatives(6) == range(7) and order.alternatives(7) == range(7, 12)

  def test_other_weights_are_another_stream(self, source, tmp_path):
    other = open_source(f"0.6 folder:{tmp_path}/a + 0.4 folder:{tmp_path}/b")
    assert make_order(source, 1).identity != make_order(other, 1).identity

  @pytest.mark.parametrize(
    ("weights", "shares"),
    [(("0.7", "0.3"), [7, 3]), (("2", "1", "1"), [2, 1, 1]), (("1", "1"), [1, 1]), (("70", "30"), [7, 3])],
  )
  def test_shares_are_the_smallest_whole_numbers(self, weights, shares):
    assert period_shares([Fraction(weight) for weight in weights]) == shares

  def test_weights_that_fit_no_short_period_are_rounded(self):
    shares = period_shares([Fraction("0.333333"), Fraction("0.666667")])
    assert sum(shares) == 10_000 and shares[0] == 3333

  def test_a_plus_in_a_path_is_no_mixture(self):
    assert not is_mixture("folder:/my/cats + dogs") and not is_mixture("folder:/a+b")
    assert is_mixture("folder:/a + folder:/b") and is_mixture("0.5 folder:/a")
    assert split_specs("1 folder:/a/train + 2 folder:/b/train") == {}

  def test_mistakes_are_explained(self, tmp_path):
    make_folder(tmp_path / "a", {"": 1})
    for spec, says in (
      (f"x folder:{tmp_path}/a + 1 folder:{tmp_path}/a", "not of the form WEIGHT scheme:rest"),
      (f"0 folder:{tmp_path}/a + 1 folder:{tmp_path}/a", "must be more than 0"),
      (f"0.00001 folder:{tmp_path}/a + 1 folder:{tmp_path}/a", "less than 1 / 10000"),
      (f"1 folder:{tmp_path}/a + 1 folder:{tmp_path}/b", "there is no .*/b"),
    ):
      with pytest.raises(ValueError, match=says):
        open_source(spec)


@pytest.fixture
def store():
  """A folder of an object store (fsspec's in memory)."""
  files = fsspec.filesystem("memory")
  for name in ("photos/b/1.png", "photos/a/x/0.png", "photos/2.PNG", "photos/.hidden/3.png", "photos/notes.txt"):
    files.pipe(f"/{name}", PNG[int(name[-5]) if name[-5].isdecimal() else 0])
  yield files
  files.rm("/photos", recursive=True)


class TestObjectStores:
  def test_a_folder(self, store, tmp_path):
    source = open_source("folder:memory://photos", cache_dir=tmp_path)
    assert [source.describe(i) for i in range(3)] == [f"memory://photos/{n}" for n in ("2.PNG", "a/x/0.png", "b/1.png")]
    assert [source[i] for i in range(3)] == [
      {"image": PNG[2], "label": -1}, {"image": PNG[0], "label": 0}, {"image": PNG[1], "label": 1}
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no files at all"):
      open_source("folder:memory://nothing", cache_dir=tmp_path)

  def test_the_index_of_a_scan_is_used(self, store, tmp_path):
    rescan("folder:memory://photos", cache_dir=tmp_path)
    store.pipe("/photos/4.png", PNG[4])
    assert len(open_source("folder:memory://photos", cache_dir=tmp_path)) == 3
    assert len(rescan("folder:memory://photos", cache_dir=tmp_path)) == 4

  def test_shards_and_tables(self, store, tmp_path):
    store.pipe("/photos/t/0.tar", make_tar(tmp_path / "0.tar", [("5.png", PNG[5]), ("5.cls", b"7")]).read_bytes())
    source = open_source("tar:memory://photos/t/*.tar", cache_dir=tmp_path)
    assert source[0] == {"image": PNG[5], "label": 0} and source.class_names == ("7",)
    store.pipe("/photos/p/0.parquet", make_parquet(tmp_path / "0.parquet", 6).read_bytes())
    source = open_source("parquet:memory://photos/p/*.parquet")
    assert source[5] == {"image": PNG[5], "label": 1}
    with pytest.raises(ValueError, match=r"no file matches .*holds 0\.tar"):
      open_source("tar:memory://photos/t/*.tra", cache_dir=tmp_path)

  def test_a_store_without_driver_is_told(self):
    with pytest.raises(ValueError, match="data.source: nosuch://x cannot be opened"):
      open_source("folder:nosuch://x")
