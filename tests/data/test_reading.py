"""A source that stalls or fails for a moment."""

import pickle
import threading

import numpy as np
import pytest

from vit_jax.data import reading
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.reading import Reader, Stalled
from vit_jax.data.views import MultiCrop

VIEWS = MultiCrop(global_size=8, local_size=8, local_number=0, mask_grid=None)


class Slow:
  """Record i is a picture with label i; the first `times` reads of each record in `stalled` hang until the end."""

  num_classes, class_names = 0, ()

  def __init__(self, stalled=(), times=1, errors=(), remote=False):
    self.left = dict.fromkeys(stalled, times)
    self.errors, self.remote = list(errors), remote
    self.end = threading.Event()

  def __len__(self):
    return 8

  def __getitem__(self, index):
    if self.errors:
      kind, *arguments = self.errors.pop()
      raise kind(*arguments)
    if self.left.get(index, 0):
      self.left[index] -= 1
      self.end.wait()
    return {"image": np.full((9, 9, 3), index, np.uint8), "label": index}

  def describe(self, index):
    return f"picture-{index}"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
  monkeypatch.setattr(reading, "_PAUSE", 0.01)


def test_a_record_that_stalls_is_reported_and_asked_for_again(caplog):
  source = Slow([3], times=2, remote=True)
  assert Reader(source, 0.1)[3]["label"] == 3
  assert caplog.text.count("picture-3 has not come within data.timeout = 0.1 s") == 2
  source.end.set()


def test_a_source_that_stays_silent_ends_the_run_with_the_record(tmp_path):
  source = Slow([5], times=99, remote=True)
  with (
    make_pipeline(
      source, VIEWS, batch_size=8, seed=0, workers=0, timeout=0.05, bad_records=tmp_path / "bad.jsonl"
    ) as pipeline,
    pytest.raises(RuntimeError, match="data.source does not answer: picture-5 was asked for 5 times"),
  ):
    next(pipeline)
  assert not (tmp_path / "bad.jsonl").exists()  # it is not the image that is bad
  source.end.set()


def test_the_stream_does_not_depend_on_stalls():
  def batch(source, timeout):
    with make_pipeline(source, VIEWS, batch_size=8, seed=0, workers=0, timeout=timeout) as pipeline:
      return next(pipeline)

  source = Slow([1, 2], remote=True)
  stalled, smooth = batch(source, 0.1), batch(Slow(), None)
  for key in smooth:
    np.testing.assert_array_equal(stalled[key], smooth[key])
  source.end.set()


def test_a_moment_without_network_is_survived_and_a_missing_file_is_not_waited_for():
  assert Reader(Slow(errors=[(ConnectionError,), (TimeoutError,)], remote=True), 5.0)[2]["label"] == 2
  source = Slow(errors=[(ConnectionError,)] * 9, remote=True)
  with pytest.raises(ConnectionError):
    Reader(source, None)[2]
  assert len(source.errors) == 4
  for source in (Slow(errors=[(FileNotFoundError,)] * 2, remote=True), Slow(errors=[(OSError, 5, "I/O")] * 2)):
    with pytest.raises(OSError):
      Reader(source, 5.0)[2]
    assert len(source.errors) == 1


def test_the_reading_thread_ends_with_its_reader():
  before = set(threading.enumerate())
  reader = Reader(Slow(remote=True), 5.0)
  assert reader[1]["label"] == 1
  (own,) = (thread for thread in set(threading.enumerate()) - before if thread.name == "read-record")
  del reader
  own.join(timeout=5)
  assert not own.is_alive()


def test_it_travels_to_another_process():
  from vit_jax.data.sources import open_source

  reader = Reader(open_source("synthetic:noise?size=8&count=4&format=none&classes=4"), 5.0)
  reader[0]
  assert pickle.loads(pickle.dumps(reader))[3]["label"] == 3


def test_a_batch_that_does_not_come_from_a_disk_is_reported_until_it_comes(caplog):
  source = Slow([5])
  with make_pipeline(source, VIEWS, batch_size=8, seed=0, workers=0, timeout=0.1) as pipeline:
    threading.Timer(0.35, source.end.set).start()
    assert sorted(next(pipeline)["label"]) == list(range(8))
  assert caplog.text.count("batch 0 has not come") >= 2


def test_stalled_is_no_bad_image():
  assert not issubclass(Stalled, OSError)
