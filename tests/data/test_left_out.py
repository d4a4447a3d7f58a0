"""The accounting of what sources do not use."""

import json

from vit_jax.data import listing, storage
from vit_jax.data.left_out import LeftOut, Reason, in_a_line, left_out_of, printable
from vit_jax.data.sources import open_source


def test_everything_is_counted_and_some_of_it_named():
  left_out = LeftOut()
  for i in range(1000):
    left_out.add(".txt", f"{i}.txt", expected=True)
  left_out.add("link to nothing", "a\x1b[2J\n", 3)
  assert left_out.total == 1003 and list(left_out) == [".txt", "link to nothing"] and not left_out.expected
  assert len(left_out[".txt"].examples) == 20 and left_out[".txt"].expected
  assert left_out.text() == "1,000 x .txt (0.txt, 1.txt, 2.txt, …), 3 x link to nothing (a\\x1b[2J\\n, …)"
  assert LeftOut(json.loads(json.dumps(left_out.to_json()))) == left_out
  both = LeftOut()
  both.merge(left_out)
  both.merge(left_out)
  assert both.total == 2006 and both[".txt"].count == 2000 and len(both[".txt"].examples) == 20
  assert LeftOut().text() == "nothing" and not LeftOut() and LeftOut().expected


def test_reasons_and_names_are_bounded_and_the_counts_stay_exact():
  left_out = LeftOut()
  for i in range(500):
    left_out.add(f".ending{i}", "x" * 10_000, expected=True)
  assert left_out.total == 500 and len(left_out) == 51 and not left_out.expected
  assert max(len(name) for reason in left_out.values() for name in reason.examples) <= 201
  assert len(left_out.text()) < 3000 and left_out.text().endswith("45 for 45 other reasons")
  assert len(left_out.lines()) == 51
  merged = LeftOut({"a": Reason(1, ("x",))})
  merged.merge(left_out)
  assert merged.total == 501 and len(merged) <= 52


def test_what_is_shown_is_a_line_that_a_terminal_can_show():
  assert printable("Zürich 東京") == "Zürich 東京" and printable("\udcff\r\x07") == "\\udcff\\r\\x07"
  assert in_a_line(ValueError("a\n  b\x00c")) == "a b\\x00c" and in_a_line(ValueError()) == "ValueError"


def test_a_source_without_the_attribute_leaves_nothing_out():
  assert not left_out_of(open_source("synthetic:noise?size=8&count=2"))


def test_what_an_object_store_holds_besides_files_is_named(monkeypatch):
  found = [("", "directory"), ("a/", "file"), ("a/1.png", "file"), ("a/l.png", "link"), ("b", "other"), ("c", "file")]
  monkeypatch.setattr(storage, "remote_files", lambda root: [*found, (".x/2.png", "file")])
  listed = listing.list_remote("memory://x")
  names, labels, classes = listed.images()
  assert [names[i] for i in range(len(names))] == ["a/1.png"] and labels.tolist() == [0] and classes == ("a",)
  assert {reason: found.examples for reason, found in listed.left_out.items()} == {
    "of the store's kind 'link'": ("a/l.png",), "of the store's kind 'other'": ("b",), "no extension": ("c",),
    "hidden": (".x/2.png",),
  }  # fmt: skip
