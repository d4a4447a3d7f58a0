"""Tar shards: every member is an image, a label of one, or counted under a reason; no content stops the reading."""

import io
import tarfile

import pytest

from tests.data import pictures
from vit_jax.data.sources import open_source
from vit_jax.data.tar_members import NoShard, read_shard

NO_LABEL = ".json with none of label, labels, fine_label, cls, class, class_id"
PNG = [pictures.encoded(pictures.smooth(9, 9, i), "PNG") for i in range(12)]


def info(name, size=0, **fields):
  member = tarfile.TarInfo(name)
  member.size = size
  for field, value in fields.items():
    setattr(member, field, value)
  return member


def packed(*members, format=tarfile.GNU_FORMAT):
  """A tar file of (name, bytes) or TarInfo members."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=format) as tar:
    for member in members:
      if isinstance(member, tarfile.TarInfo):
        tar.addfile(member)
      else:
        tar.addfile(info(member[0], len(member[1])), io.BytesIO(member[1]))
  return file.getvalue()


@pytest.fixture
def read(tmp_path):
  """bytes of a shard -> ({name of an image: its label}, {reason: count}); checks where each image is."""

  def reading(data):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    images, left_out = read_shard(str(path))
    for image in images:
      assert data[image.offset : image.offset + image.size].startswith(b"\x89PNG")
    return {image.name: image.label for image in images}, {reason: r.count for reason, r in left_out.items()}

  return reading


@pytest.mark.parametrize(
  ("members", "labels"),
  [
    (["q0.v1.png", "q0.v1.cls=3"], {"q0.v1.png": "3"}),
    (["2024.01.02.png", "2024.01.02.cls=a", "2024.01.03.png"], {"2024.01.02.png": "a", "2024.01.03.png": None}),
    (["1.left.png", "1.right.png", "1.cls=5"], {"1.left.png": "5", "1.right.png": "5"}),
    (["1.left.png", "1.right.png", "1.cls=5", "1.left.cls=6"], {"1.left.png": "6", "1.right.png": "5"}),
    (["1.png", "1.v2.png", "1.cls=5"], {"1.png": "5", "1.v2.png": "5"}),
    (["a.b.png", "a.b.c.png", "a.b.cls=1"], {"a.b.png": "1", "a.b.c.png": None}),  # 1 may be of a.b alone
    (["v1.0/x.png", "v1.cls=1", "v1.0/x.cls=2"], {"v1.0/x.png": "2"}),  # dots of folders do not count
    (["x/1.png", "y/1.cls=4", "y/1.png"], {"x/1.png": None, "y/1.png": "4"}),
    (["1.PNG", '1.JSON={"class": "cat"}'], {"1.PNG": "cat"}),
    (["1.png", '1.json={"label": null, "cls": 3.0}'], {"1.png": "3"}),
    (["1.png", "1.cls=-1"], {"1.png": None}),
    (["1.png", "1.cls="], {"1.png": None}),
    (["1.png", '1.json={"label": true}'], {"1.png": "True"}),
    (["1.png", '1.json={"label": 20240101123000000000001}'], {"1.png": "20240101123000000000001"}),
    (["1.png", "1.cls=\ufeffcat\r\n"], {"1.png": "cat"}),
  ],
)
def test_labels_are_found_by_name(read, members, labels):
  parts = (member.partition("=") for member in members)
  found, left_out = read(packed(*((name, said.encode() if equals else PNG[0]) for name, equals, said in parts)))
  assert found == labels and set(left_out) <= {"label without an image"}


def test_repeated_names_are_all_used_with_the_labels_that_come_with_them(tmp_path):
  path = tmp_path / "a.tar"

  def said(*members):
    path.write_bytes(packed(*members))
    images, left_out = read_shard(str(path))
    return [image.label for image in images], dict(left_out)

  a, b = ("a.png", PNG[0]), ("a.png", PNG[1])
  assert said(a, ("a.cls", b"1"), b, ("a.cls", b"2")) == (["1", "2"], {})
  assert said(a, b, ("a.cls", b"1")) == (["1", "1"], {})
  assert said(a, ("a.jpg", PNG[1]), ("a.cls", b"1")) == (["1", "1"], {})
  labels, left_out = said(a, ("a.cls", b"1"), ("a.cls", b"2"))
  assert labels == ["1"] and left_out["label without an image"].count == 1
  labels, left_out = said(a, b, a, ("a.cls", b"1"), ("a.cls", b"2"))
  assert labels == ["1", "2", None] and sum(found.count for found in left_out.values()) == 1


@pytest.mark.parametrize(
  ("members", "expected"),
  [
    ([("1.cls", b"x" * 4001)], {".cls of more than 4,000 bytes": 1}),
    ([("1.cls", b"x" * 1001)], {"label that is longer than 1,000 characters": 1}),
    ([("1.cls", b"\xff\xfe\0\1" * 9)], {"label that is bytes that are no text": 1}),
    ([("1.cls", b"\x80\x04K\x03.")], {"label that is bytes that are no text": 1}),
    ([("1.cls", b"a\nb")], {"label that is no line of text": 1}),
    ([("1.cls", b"1.5")], {}),  # a name
    ([("1.json", b"[" * 100_000)], {"label that is nested too deeply": 1}),
    ([("1.json", b'{"a":' * 100_000)], {"label that is nested too deeply": 1}),
    ([("1.json", b'{"label": 1')], {"label that is no whole JSON": 1}),
    ([("1.json", b'{"label": ' + b"9" * 5000 + b"}")], {"label that is no whole JSON": 1}),
    ([("1.json", b'{"label": [1, 2]}')], {"label that is a list": 1}),
    ([("1.json", b'{"label": 1.5}')], {"label that is a number that is not whole": 1}),
    ([("1.json", b'{"label": NaN}')], {}),
    ([("1.json", b'{"width": 3}')], {NO_LABEL: 1}),
    ([("1.json", b"3")], {NO_LABEL: 1}),
    ([("1.json", b'{"x": "' + b"y" * (1 << 20) + b'"}')], {".json of more than 1,048,576 bytes": 1}),
    ([("2.cls", b"3")], {"label without an image": 1}),
    ([("1.cls", b"3"), ("1.json", b'{"label": 4}')], {"label that another of its sample contradicts": 1}),
    ([("1.cls", b"3"), ("1.json", b'{"label": 3}')], {}),
    ([("1.txt", b"a caption"), ("1.gif.bak", b"x"), ("noext", b"x")], {".txt": 1, ".bak": 1, "no extension": 1}),
    ([("1.seg.png", PNG[0])], {"label map .seg.png, no photograph": 1}),
    ([("._1.png", b"x"), (".hidden/2.txt", b"")], {"hidden": 1, ".txt": 1}),
    ([("1.mp4", b"x")], {".mp4: videos are not read: write their frames as images": 1}),
    ([info("folder", type=tarfile.DIRTYPE)], {}),
    ([info("pipe.png", type=tarfile.FIFOTYPE)], {"pipe, device or other special member": 1}),
    ([info("dev.png", type=tarfile.CHRTYPE)], {"pipe, device or other special member": 1}),
    ([info("l.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")], {"link that leads to no image of its shard": 1}),
    ([info("l.png", type=tarfile.SYMTYPE, linkname="l.png")], {"link that leads to no image of its shard": 1}),
  ],
)  # fmt: skip
def test_what_is_not_used_is_counted_and_the_image_stays(read, members, expected):
  images, left_out = read(packed(("1.png", PNG[0]), *members))
  assert list(images) == ["1.png"] and left_out == expected


def test_links_within_a_shard_are_images(read):
  links = info("b/2.png", type=tarfile.LNKTYPE, linkname="a/1.png"), info("b/3.png", type=tarfile.SYMTYPE,
                                                                         linkname="../a/1.png")  # fmt: skip
  images, left_out = read(packed(("a/1.png", PNG[0]), *links, ("b/2.cls", b"7")))
  assert images == {"a/1.png": None, "b/2.png": "7", "b/3.png": None} and not left_out


def test_images_without_an_ending_are_told_by_their_content(read):
  images, left_out = read(packed(("2024.01.02", PNG[0]), ("2024.01.02.cls", b"4"), ("b", PNG[1]), ("c", b"x")))
  assert images == {"2024.01.02": "4", "b": None} and left_out == {"no extension": 1}


SIX = [(f"{i}.png", PNG[i]) for i in range(6)]


def test_a_shard_cut_at_a_member_says_so(read):
  whole = packed(*SIX)
  third = whole.index(b"3.png")
  images, left_out = read(whole[:third])
  assert list(images) == ["0.png", "1.png", "2.png"]
  assert left_out == {"shard without an end: cut off, or never finished": 1}
  for end in (third + 100, third + 512 + 10):  # inside a header; inside an image
    images, left_out = read(whole[:end])
    assert list(images) == ["0.png", "1.png", "2.png"] and sum(left_out.values()) == 1
  assert read(whole[: whole.rindex(b"5.png") + 512 + -(-len(PNG[5]) // 512) * 512 + 512])[1] == {}  # one zero block


def test_behind_a_damaged_header_the_next_whole_one_is_found(read):
  data = bytearray(packed(*SIX))
  data[data.index(b"2.png") + 3] ^= 0xFF
  images, left_out = read(bytes(data))
  assert list(images) == ["0.png", "1.png", "3.png", "4.png", "5.png"]
  assert left_out == {"damaged stretch of a shard, with what it holds": 1}
  data = bytearray(packed(*SIX))
  data[0] ^= 0xFF
  assert len(read(bytes(data))[0]) == 5  # also the first


def test_shards_joined_by_cat_are_all_read(read):
  images, left_out = read(packed(*SIX[:2]) + packed(*SIX[2:4]) + packed(*SIX[4:]))
  assert len(images) == 6 and not left_out
  images, left_out = read(packed(*SIX[:2]) + b"rubbish" * 100 + packed(*SIX[2:4]))
  assert list(images)[:2] == ["0.png", "1.png"]
  assert left_out == {"stretch behind the end of a shard, with what it holds": 1}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_that_claim_gigabytes_take_none(read, kind):
  huge = info("x", 1 << 40, type=kind).tobuf(tarfile.GNU_FORMAT)
  images, left_out = read(packed(SIX[0])[: 512 + -(-len(PNG[0]) // 512) * 512] + huge + packed(SIX[1]))
  assert list(images) == ["0.png", "1.png"] and sum(left_out.values()) == 1


def test_terabytes_of_holes_are_passed_over(tmp_path):
  whole, second = packed(SIX[0]), packed(SIX[1])
  for begin, end in ((whole, second), (whole[:2048] + b"x" * 512, second), (b"", b"")):
    with open(tmp_path / "x.tar", "wb") as file:
      file.write(begin)
      file.truncate(1 << 40)
      file.seek(1 << 40)
      file.write(end)
    images, _ = read_shard(str(tmp_path / "x.tar"))
    assert [image.name for image in images] == (["0.png", "1.png"] if begin else [])


def test_a_negative_size_ends(read):
  header = bytearray(info("x.png", 1).tobuf(tarfile.GNU_FORMAT))
  header[124:136] = b"\xff" * 11 + b"\x00"  # base 256: -256
  header[148:156] = b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  images, left_out = read(bytes(header) + packed(SIX[0]))
  assert list(images) == ["0.png"] and sum(left_out.values()) == 1


def test_many_headers_before_a_member_do_not_exhaust_the_stack(read):
  pax = info("x", 12, type=tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT) + b"12 path=abc\n".ljust(512, b"\0")
  images, left_out = read(pax * 3000 + packed(SIX[0]))
  assert list(images) == ["abc"] and left_out  # the nearest of them is its own


@pytest.mark.parametrize(
  ("data", "says"),
  [(b"", "is empty"), (b"no tar" * 999, "is no whole tar file"), (b"BZh91AY", "is compressed .bzip2."), (b"\0", None)],
)
def test_what_is_no_shard_is_refused(read, data, says):
  if says is None:
    assert read(data) == ({}, {})
    return
  with pytest.raises(NoShard, match=says):
    read(data)


def test_names_that_are_no_text_are_read_and_shown(tmp_path):
  (tmp_path / "a.tar").write_bytes(packed((b"\xff\n.png".decode("utf-8", "surrogateescape"), PNG[0])))
  source = open_source(f"tar:{tmp_path}/a.tar", cache_dir=tmp_path)
  assert source[0] == {"image": PNG[0], "label": -1} and source.describe(0).isprintable()


def test_numbers_of_shards_that_are_not_there_are_named(tmp_path, caplog):
  for i in (0, 2):
    (tmp_path / f"{i:02}.tar").write_bytes(packed(SIX[i]))
  (tmp_path / "xx.tar").mkdir()
  source = open_source(f"tar:{tmp_path}/{{00..02}}.tar", cache_dir=tmp_path / "cache")
  assert source.left_out["file that does not exist"].examples == (f"{tmp_path}/01.tar",) and "01.tar" in caplog.text
  assert open_source(f"tar:{tmp_path}/*.tar", cache_dir=tmp_path / "cache").left_out["folder that matches the pattern"]
  with pytest.raises(ValueError, match="stands for more than 1,000,000 files"):
    open_source(f"tar:{tmp_path}/{{0..99999999}}.tar")


def test_the_index_holds_the_accounting_and_follows_the_class_names(tmp_path):
  (tmp_path / "a.tar").write_bytes(packed(("0.png", PNG[0]), ("0.cls", b"1"), ("0.txt", b"caption")))
  spec = f"tar:{tmp_path}/a.tar"
  first = open_source(spec, cache_dir=tmp_path / "cache")
  assert open_source(spec, cache_dir=tmp_path / "cache").left_out == first.left_out and first.left_out.total == 1
  assert first.class_names == ("1",) and first[0]["label"] == 0
  (tmp_path / "classes.json").write_text('["cat", "dog"]')
  named = open_source(spec, cache_dir=tmp_path / "cache")
  assert named.class_names == ("cat", "dog") and named[0]["label"] == 1
