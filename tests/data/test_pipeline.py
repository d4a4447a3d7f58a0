"""The pipeline: the same stream whoever computes it, exact epochs, exact resume, and what it does with bad images."""

import collections
import dataclasses
import json
import logging
import multiprocessing
import threading
import time

import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data import pipeline as pipeline_module
from vit_jax.data.decode import BadImage
from vit_jax.data.groups import LossGroups, Unreadable
from vit_jax.data.pipeline import BadRecords, make_pipeline
from vit_jax.data.sources import open_source
from vit_jax.data.views import MultiCrop
from vit_jax.data.views.multi_crop.masks import masked_patches

VIEWS = MultiCrop(global_size=16, local_size=8, local_number=2, mask_grid=(4, 4), loss_group_size=4)


class Numbered:
  """Record i is a picture with label i; those in `bad` cannot be decoded, those in `fatal` raise a foreign error."""

  num_classes = 0
  class_names = ()

  def __init__(self, count, bad=(), fatal=()):
    self.count, self.bad, self.fatal = count, set(bad), set(fatal)

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    if index in self.fatal:
      raise KeyError("no such column")
    if index in self.bad:
      return {"image": b"broken", "label": index}
    return {"image": np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8), "label": index}

  def describe(self, index):
    return f"picture-{index}"


class Witnessed(Numbered):
  """Leaves a file when it is read."""

  def __init__(self, file):
    super().__init__(20)
    self.file = file

  def __getitem__(self, index):
    self.file.touch()
    return super().__getitem__(index)


def batches(count, *, source=None, state=None, batch_size=8, views=VIEWS, **options):
  options = {"seed": 3, "workers": 0, **options}
  with make_pipeline(source or Numbered(20), views, batch_size=batch_size, **options) as pipeline:
    if state is not None:
      pipeline.set_state(state)
    return [next(pipeline) for _ in range(count)]


def assert_same(a, b):
  assert len(a) == len(b)
  for left, right in zip(a, b, strict=True):
    assert left.keys() == right.keys()
    for key in left:
      np.testing.assert_array_equal(left[key], right[key], err_msg=key)


@pytest.fixture(scope="module")
def reference():
  return batches(8)


def test_a_batch_has_the_documented_arrays(reference):
  shapes = {key: (value.shape, value.dtype.name) for key, value in reference[0].items()}
  masked = masked_patches(4, (4, 4), VIEWS.mask_probability, VIEWS.mask_ratio)
  assert shapes == {
    "global_crops": ((8, 2, 16, 16, 3), "uint8"),
    "local_crops": ((8, 2, 8, 8, 3), "uint8"),
    "label": ((8,), "int32"),
    "masks": ((8, 2, 16), "bool"),
    "mask_indices": ((2, masked), "int32"),
    "mask_weights": ((2, masked), "float32"),
  }


def test_indices_and_weights_belong_to_the_masks_of_their_group(reference):
  for batch in reference:
    for group in range(2):
      masks = batch["masks"][4 * group : 4 * group + 4]
      np.testing.assert_array_equal(batch["mask_indices"][group], np.flatnonzero(masks))
      assert batch["mask_weights"][group].sum() == pytest.approx(masks.any(-1).sum())  # one per masked crop


def test_every_image_comes_once_in_each_epoch(reference):
  labels = np.concatenate([batch["label"] for batch in reference])[:60]  # 20 records: an epoch ends inside a batch
  epochs = labels.reshape(3, 20)
  for epoch in epochs:
    assert sorted(epoch) == list(range(20))
  assert len({tuple(epoch) for epoch in epochs}) == 3  # each in its own order


def test_the_same_image_gets_other_crops_in_the_next_epoch(reference):
  crops = collections.defaultdict(list)
  for batch in reference:
    for label, crop in zip(batch["label"], batch["global_crops"], strict=True):
      crops[int(label)].append(crop)
  assert all(not np.array_equal(seen[0], seen[1]) for seen in crops.values() if len(seen) > 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_can_be_begun_before_they_are_asked_for(reference, workers, tmp_path):
  seen = tmp_path / "seen"
  with make_pipeline(Witnessed(seen), VIEWS, batch_size=8, seed=3, workers=workers) as pipeline:
    state = pipeline.get_state()
    pipeline.start()
    deadline = time.monotonic() + 60
    while not (multiprocessing.active_children() if workers else seen.exists()):
      assert time.monotonic() < deadline
      time.sleep(0.01)
    assert pipeline.get_state() == state
    assert_same([next(pipeline), next(pipeline)], reference[:2])
  with pytest.raises(ValueError, match="closed"):
    pipeline.start()


def test_another_seed_is_another_stream(reference):
  other = batches(1, seed=4)[0]
  assert not np.array_equal(other["label"], reference[0]["label"])
  assert not np.array_equal(other["masks"], reference[0]["masks"])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resume_gives_exactly_the_next_batch_on_any_number_of_workers(reference, workers):
  with make_pipeline(Numbered(20), VIEWS, batch_size=8, seed=3, workers=workers) as pipeline:
    first = [next(pipeline) for _ in range(3)]
    state = json.loads(json.dumps(pipeline.get_state()))
    pipeline.set_state({**state, "next_batch": 1})  # back and forth within one pipeline
    again = next(pipeline)
  assert_same([*first, again], [*reference[:3], reference[1]])
  assert_same(batches(3, state=state, workers=(workers + 1) % 3), reference[3:6])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(count):
  whole = batches(5, batch_size=16)
  state = {"next_batch": 2, "seed": 3, "records": 20, "batch_size": 16, "loss_group_size": 4}
  parts = [batches(3, batch_size=16, state=state, process_index=i, process_count=count) for i in range(count)]
  joined = [{key: np.concatenate([part[key] for part in rows]) for key in rows[0]} for rows in zip(*parts, strict=True)]
  assert_same(joined, whole[2:])


def test_a_run_can_go_on_with_another_number_of_processes():
  with make_pipeline(
    Numbered(20), VIEWS, batch_size=8, seed=3, workers=0, process_index=1, process_count=2
  ) as pipeline:
    next(pipeline)
    state = pipeline.get_state()
  assert_same(batches(1, state=state), batches(2)[1:])


@pytest.mark.parametrize("counts", [(1, 4, 2, 1, 4, 2), (4, 1, 1, 2, 4, 4)])
def test_no_image_is_lost_or_repeated_when_the_number_of_processes_changes_within_an_epoch(counts):
  state, seen = None, []
  for count in counts:  # a restart for every batch, each on another number of processes
    states = []
    for index in range(count):
      options = {"batch_size": 16, "seed": 3, "workers": 0, "process_index": index, "process_count": count}
      with make_pipeline(Numbered(90), VIEWS, **options) as pipeline:
        if state is not None:
          pipeline.set_state(state)
        seen += next(pipeline)["label"].tolist()
        states.append(json.loads(json.dumps(pipeline.get_state())))
    assert all(other == states[0] for other in states)  # any process's state is that of the job
    state = states[0]
  assert sorted(seen[:90]) == list(range(90)) and len(set(seen[90:])) == 6  # the next epoch begins inside a batch


def test_processes_may_share_a_batch_in_any_way():
  whole = batches(3, batch_size=16)
  parts = [batches(3, batch_size=16, local_groups=groups) for groups in ((0, 2), (1, 3))]
  for number, batch in enumerate(whole):
    rows = batch["label"].reshape(4, 4)
    for part, groups in zip(parts, ((0, 2), (1, 3)), strict=True):
      np.testing.assert_array_equal(part[number]["label"].reshape(2, 4), rows[list(groups)])


def test_without_masks_there_are_no_mask_arrays():
  views = MultiCrop(global_size=16, local_size=8, local_number=0, mask_grid=None)
  batch = batches(1, views=views)[0]
  assert set(batch) == {"global_crops", "local_crops", "label"}
  assert batch["local_crops"].shape == (8, 0, 8, 8, 3)


SEVERAL = dataclasses.replace(
  VIEWS, stride=4, mask_grid=(4, 4), resolutions=((16, 8, 24, 0.5), (24, 8, 32, 0.2), (24, 12, 32, 0.3))
)


def named(batch):
  sizes = [batch[f"{kind}_crops"].shape[3] for kind in ("global", "local", "gram")]
  return "/".join(map(str, sizes))


@pytest.mark.parametrize("views", [VIEWS, dataclasses.replace(VIEWS, gram_size=24, mask_grid=None), SEVERAL])
def test_batches_have_the_announced_shapes(views):
  announced = {variant.name: variant.arrays(8) for variant in views.variants()}
  for batch in batches(6, views=views):
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
    assert shapes in announced.values()


@pytest.fixture(scope="module")
def whole():
  return batches(12, views=SEVERAL)


class TestSeveralResolutions:
  def test_each_batch_has_one_with_its_masks(self, whole):
    assert {named(batch) for batch in whole} == {"16/8/24", "24/8/32", "24/12/32"}
    for batch in whole:
      assert batch["masks"].shape == (8, 2, (batch["global_crops"].shape[2] // 4) ** 2)
      for group in range(2):
        masks = batch["masks"][4 * group : 4 * group + 4]
        np.testing.assert_array_equal(batch["mask_indices"][group], np.flatnonzero(masks))

  def test_a_batch_is_that_of_a_run_at_its_resolution_alone(self, whole):
    alone = batches(12, views=SEVERAL.variants()[0])
    same = [(a, b) for a, b in zip(whole, alone, strict=True) if named(a) == "16/8/24"]
    assert len(same) >= 3
    for a, b in same:
      assert_same([a], [b])

  @pytest.mark.parametrize(("workers", "count"), [(0, 1), (2, 1), (0, 2), (1, 2)])
  def test_resume_gives_exactly_the_next_batch(self, whole, workers, count):
    with make_pipeline(Numbered(20), SEVERAL, batch_size=8, seed=3, workers=0) as pipeline:
      for _ in range(5):
        next(pipeline)
      state = json.loads(json.dumps(pipeline.get_state()))
    parts = [
      batches(5, views=SEVERAL, state=state, workers=workers, process_index=i, process_count=count)
      for i in range(count)
    ]
    joined = [
      {key: np.concatenate([part[key] for part in rows]) for key in rows[0]} for rows in zip(*parts, strict=True)
    ]
    assert_same(joined, whole[5:10])

  def test_they_come_as_often_as_asked_whatever_the_batch_and_in_no_order(self):
    groups = LossGroups(Numbered(20), SEVERAL, seed=7, group_size=4, groups_per_batch=2)
    drawn = [groups.views(batch).name for batch in range(4000)]
    counts = collections.Counter(drawn)
    for row in SEVERAL.resolutions:
      share = counts["/".join(map(str, row[:3]))] / 4000
      assert abs(share - row.probability) < 4 * np.sqrt(row.probability * (1 - row.probability) / 4000)
    repeated = np.mean([a == b for a, b in zip(drawn[:-1], drawn[1:], strict=True)])
    assert abs(repeated - (0.5**2 + 0.2**2 + 0.3**2)) < 0.04  # independent of the one before
    other = LossGroups(Numbered(20), SEVERAL, seed=8, group_size=4, groups_per_batch=2)
    assert [other.views(batch).name for batch in range(40)] != drawn[:40]
    larger = LossGroups(Numbered(99), SEVERAL, seed=7, group_size=8, groups_per_batch=64)
    assert [larger.views(batch).name for batch in range(40)] == drawn[:40]

  def test_what_is_needed_next_comes_first(self, whole):
    with make_pipeline(Numbered(20), SEVERAL, batch_size=8, seed=3, workers=0) as pipeline:
      pipeline.set_state({**pipeline.get_state(), "next_batch": 4})
      assert [views.name for views in pipeline.upcoming(8)] == list(dict.fromkeys(named(batch) for batch in whole[4:]))
      assert [views.name for views in pipeline.upcoming(1)] == [named(whole[4])]


def test_a_batch_may_be_larger_than_the_source():
  labels = np.concatenate([batch["label"] for batch in batches(3, source=Numbered(5))])
  assert [sorted(labels[i : i + 5]) for i in range(0, 20, 5)] == [list(range(5))] * 4


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"batch_size": 10}, "loss_group_size = 4 does not divide the 10 images"),
    ({"batch_size": 8, "process_count": 4}, "loss_group_size = 4 does not divide the 2 images"),
    ({"batch_size": 8, "process_count": 3}, "batch_size = 8 cannot be shared by 3 processes"),
    ({"batch_size": 8, "process_count": 2, "process_index": 2}, "process_index = 2"),
    ({"batch_size": 8, "workers": -2}, "data.workers = -2"),
  ],
)
def test_impossible_combinations_are_explained(options, says):
  with pytest.raises(ValueError, match=says):
    make_pipeline(Numbered(20), VIEWS, **{"seed": 0, "workers": 0, **options})


def test_the_state_of_another_stream_is_refused():
  with make_pipeline(Numbered(20), VIEWS, batch_size=8, seed=3, workers=0) as pipeline:
    state = pipeline.get_state()
  with (
    make_pipeline(Numbered(21), VIEWS, batch_size=16, seed=3, workers=0) as pipeline,
    pytest.raises(ValueError, match="records 20 -> 21, batch_size 8 -> 16"),
  ):
    pipeline.set_state(state)


def test_an_accepted_change_goes_on_after_as_many_images():
  with make_pipeline(Numbered(20), VIEWS, batch_size=8, seed=3, workers=0) as pipeline:
    for _ in range(3):
      next(pipeline)
    state = pipeline.get_state()
  with make_pipeline(Numbered(20), VIEWS, batch_size=16, seed=3, workers=0) as pipeline:
    pipeline.set_state(state, exact=False)
    np.testing.assert_array_equal(next(pipeline)["label"], batches(3, batch_size=16)[2]["label"])  # 24 images -> 32


def alive():
  return {thread for thread in threading.enumerate() if thread.is_alive()}, multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_close_leaves_no_threads_and_no_processes(workers):
  threads, children = alive()
  pipeline = make_pipeline(Numbered(20), VIEWS, batch_size=8, seed=3, workers=workers)
  next(pipeline)
  assert alive() != (threads, children)
  pipeline.close()
  deadline = time.monotonic() + 2.0  # for Grain's own idle threads, which were told to end
  while alive() != (threads, children) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert alive() == (threads, children)
  pipeline.close()  # twice does no harm
  with pytest.raises(ValueError, match="closed"):
    next(pipeline)


class TestBadImages:
  def test_they_are_replaced_the_same_way_each_time_and_nothing_else_changes(self, reference):
    source = Numbered(20, bad=[4, 11])
    damaged = batches(8, source=source, max_bad_fraction=0.5)
    for clean, batch in zip(reference, damaged, strict=True):
      spared = ~np.isin(clean["label"], [4, 11])
      np.testing.assert_array_equal(batch["label"][spared], clean["label"][spared])
      np.testing.assert_array_equal(batch["global_crops"][spared], clean["global_crops"][spared])
      np.testing.assert_array_equal(batch["masks"], clean["masks"])
      assert not np.isin(batch["label"], [4, 11]).any()
    state = {"next_batch": 5, "seed": 3, "records": 20, "batch_size": 8, "loss_group_size": 4}
    assert_same(batches(3, source=source, state=state, workers=1), damaged[5:])

  def test_they_are_named_once_in_the_file_and_in_the_log(self, tmp_path, caplog):
    path = tmp_path / "run" / "bad_records.jsonl"
    with caplog.at_level(logging.WARNING):
      batches(8, source=Numbered(20, bad=[4, 11]), bad_records=path)
      batches(4, source=Numbered(20, bad=[4, 11]), bad_records=path)  # a resumed run
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((entry["record"], entry["name"]) for entry in entries) == [(4, "picture-4"), (11, "picture-11")]
    assert entries[0]["reason"] == "is no image of a known format"
    assert sum("picture-4" in record.getMessage() for record in caplog.records) == 1

  def test_a_line_that_a_kill_has_cut_off_is_written_again(self, tmp_path):
    path = tmp_path / "bad_records.jsonl"
    batches(8, source=Numbered(20, bad=[4, 11]), bad_records=path)
    whole = path.read_text()
    path.write_text(whole[:-9])
    batches(8, source=Numbered(20, bad=[4, 11]), bad_records=path)
    assert path.read_text() == whole

  @pytest.mark.parametrize("damage", ["[" * 100_000, "[1]", '{"record": "4"}', "\x00" * 9, ""])
  def test_damaged_lines_are_named_and_their_images_met_again(self, tmp_path, caplog, damage):
    path = tmp_path / "bad_records.jsonl"
    batches(8, source=Numbered(20, bad=[4, 11]), bad_records=path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([damage, lines[1]]) + "\n")
    batches(8, source=Numbered(20, bad=[4, 11]), bad_records=path)
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    assert f"{path}, line 1: " in caplog.text

  def test_too_many_stop_the_run_with_examples(self, tmp_path):
    with pytest.raises(
      Unreadable, match=r"of 40 images are unreadable.*max_bad_fraction = 0\.01.*picture-.*all of them"
    ):
      batches(40, source=Numbered(40, bad=range(12)), bad_records=tmp_path / "bad.jsonl")

  def test_a_limit_of_zero_stops_at_the_first(self):
    with pytest.raises(RuntimeError, match=r"(?s)1 of .* images.*picture-4"):
      batches(8, source=Numbered(20, bad=[4]), max_bad_fraction=0.0)

  def test_ten_bad_ones_do_not_stop_a_small_source(self):
    assert len(batches(10, source=Numbered(30, bad=range(10)))) == 10

  @pytest.mark.parametrize("workers", [0, 1])
  def test_a_source_of_bad_images_only_ends_at_once(self, workers):
    with pytest.raises(Unreadable, match="in a row could not be read.*picture-"):
      batches(1, source=Numbered(20, bad=range(20)), max_bad_fraction=1.0, workers=workers)

  def test_the_share_is_of_the_images_seen(self):
    bad = BadRecords(None, 0.01, records=100_000)
    entries = [{"record": i, "name": f"{i}", "reason": "x"} for i in range(51)]
    bad.add(entries[:50], seen=5000)
    bad.add(entries[:50], seen=5100)  # the same again are not counted twice
    with pytest.raises(RuntimeError, match="51 of 5064"):
      bad.add(entries[50:], seen=5064)

  def test_the_unreadable_are_never_more_than_those_looked_at(self, tmp_path):
    entries = [{"record": i, "name": f"{i}", "reason": "x"} for i in range(42)]
    path = tmp_path / "bad.jsonl"
    with pytest.raises(Unreadable, match="42 of 52 images are unreadable"):  # ten, and those in whose place they are
      BadRecords(path, 0.01, records=100).add(entries, seen=10)
    resumed = BadRecords(path, 0.01, records=100)
    with pytest.raises(Unreadable, match="42 of 53 images"):
      resumed.add(entries[:1], seen=10)
    assert BadRecords(path, 0.01, records=40).count == 40  # of a source that has shrunk

  @pytest.mark.parametrize("workers", [0, 2])
  def test_an_error_that_is_no_bad_image_reaches_the_caller_with_the_record(self, workers):
    with pytest.raises(RuntimeError, match="reading picture-.* failed: KeyError.*no such column"):
      batches(8, source=Numbered(20, fatal=[7]), workers=workers)

  def test_a_source_that_raises_a_bad_image_or_an_io_error_is_survived(self, tmp_path):
    class Failing(Numbered):
      def __getitem__(self, index):
        if index == 3:
          raise BadImage("chunk", "is damaged")
        if index == 5:
          raise FileNotFoundError(2, "No such file", "x.jpg")
        return super().__getitem__(index)

    path = tmp_path / "bad.jsonl"
    batches(5, source=Failing(20), bad_records=path)
    reasons = {entry["record"]: entry["reason"] for entry in map(json.loads, path.read_text().splitlines())}
    assert reasons.keys() == {3, 5} and "is damaged" in reasons[3] and "No such file" in reasons[5]


def test_a_folder_of_mixed_images_goes_through_a_worker_process(tmp_path):
  folder = pictures.make_mixed_folder(tmp_path / "mixed")
  source = open_source(f"folder:{folder}")
  labels = [batch["label"] for batch in batches(10, source=source, bad_records=tmp_path / "bad.jsonl", workers=1)]
  assert set(np.concatenate(labels)) == {1}  # "good"; every "bad" one was replaced
  names = {json.loads(line)["name"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()}
  assert names == {str(folder / "bad" / name) for name in pictures.BAD}


def test_a_file_that_vanishes_during_the_run_is_replaced(tmp_path):
  folder = pictures.make_mixed_folder(tmp_path / "mixed")
  source = open_source(f"folder:{folder}")
  (folder / "good" / "deeper" / "png.png").unlink()
  batches(10, source=source, bad_records=tmp_path / "bad.jsonl")
  assert "png.png" in (tmp_path / "bad.jsonl").read_text()


def test_array_records_go_through_worker_processes(tmp_path):
  from vit_jax.data.array_records import write_array_record

  rows = [(pictures.encoded(pictures.smooth(20, 24, i), "JPEG"), i, str(i)) for i in range(20)]
  write_array_record(tmp_path / "a.array_record", rows)
  source = open_source(f"array_record:{tmp_path}/*.array_record")
  assert_same(batches(3, source=source, workers=1), batches(3, source=source))


def test_embedded_images_go_through_a_worker_process(tmp_path):
  source = open_source("embedded:textures/train?size=24&count=20", cache_dir=tmp_path)
  seen = batches(3, source=source, workers=1)
  assert_same(seen, batches(3, source=source))
  assert set(np.concatenate([batch["label"] for batch in seen])) <= set(range(source.num_classes))


def test_canvases_come_through_worker_processes_as_through_threads():
  views = dataclasses.replace(VIEWS, canvas=(32, 32))
  assert_same(batches(2, views=views), batches(2, views=views, workers=1))


def test_too_little_shared_memory_means_threads(monkeypatch, caplog):
  monkeypatch.setattr(pipeline_module, "_cores", lambda: 8)
  for free, workers in ((10**9, 4), (10**4, 0)):
    monkeypatch.setattr(pipeline_module, "_shared_memory", lambda free=free: free)
    with make_pipeline(Numbered(20), VIEWS, batch_size=8, seed=3, workers=-1) as pipeline:
      assert pipeline.workers == workers
  assert "--shm-size" in caplog.text
