"""What the preview says of a crop is what was drawn for it."""

import numpy as np

from tests.data import pictures
from tests.data.test_pipeline import VIEWS, Numbered
from vit_jax.data.augment import Crop, apply_crops
from vit_jax.data.captions import colour_caption, crop_caption, label_caption
from vit_jax.data.decode import decode
from vit_jax.data.groups import LossGroups, batch_shapes
from vit_jax.data.resampling import planes
from vit_jax.data.sources import open_source
from vit_jax.inspect.captioned import captioned_sheet


def test_every_parameter_is_said_in_the_order_of_application():
  crop = Crop(10, 20, 50, 100, True, ((3, -0.05), (0, 1.25)), True, 1.5, True)
  assert crop_caption(crop, 100, 200) == [
    "100 x 50 at (20, 10)", "25% of the image", "flipped", "hue -0.050", "brightness 1.25", "grey",
    "blur, sigma 1.50", "solarized",
  ]  # fmt: skip
  assert crop_caption(Crop(0, 0, 8, 8), 8, 8) == ["8 x 8 at (0, 0)", "100% of the image"]
  assert "of the global crop" in crop_caption(Crop(0, 0, 8, 8, window=(4, 2)), 8, 8)
  assert colour_caption((((1, 0.5),), False)) == ["contrast 0.50"]


def test_classes_are_called_by_name(tmp_path):
  for name in ("cat", "dog"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.png").write_bytes(pictures.encoded(pictures.smooth(8, 8), "PNG"))
  source = open_source(f"folder:{tmp_path}")
  assert [label_caption(source, label) for label in (0, 1, -1)] == ["class cat", "class dog", "no label"]


def test_what_is_said_to_be_drawn_makes_the_crops_of_the_training_stream():
  source = Numbered(20, bad=[4, 11])
  groups = LossGroups(source, VIEWS, 3, 4)
  for number in range(5):
    group, shapes = groups[number], batch_shapes(VIEWS, 1)
    for i, (name, size, crops, colours) in enumerate(groups.drawn(number, 4)):
      assert name == f"picture-{group['label'][i]}" and colours is None
      image = decode(source[int(group["label"][i])]["image"])
      assert image.shape[:2] == size
      made = {key: np.empty(*shapes[key])[0] for key in ("global_crops", "local_crops")}
      apply_crops(planes(image), crops, VIEWS, made["global_crops"], made["local_crops"])
      for key, array in made.items():
        np.testing.assert_array_equal(array, group[key][i])


def test_a_sheet_holds_every_picture_whole():
  rng = np.random.default_rng(0)
  pictures = [rng.integers(0, 200, (20, 20, 3), dtype=np.uint8) for _ in range(3)]
  sheet = captioned_sheet([("a title", [(picture, ["one", "two"]) for picture in pictures])], side=40, per_line=2)
  large = [picture.repeat(2, 0).repeat(2, 1) for picture in pictures]
  places = [(y, x) for y in range(sheet.shape[0] - 39) for x in range(sheet.shape[1] - 39)]
  for one in large:
    assert any((sheet[y : y + 40, x : x + 40] == one).all() for y, x in places)
