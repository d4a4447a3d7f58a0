"""embedded:shapes: the image, the masks, the boxes, the depth and the caption tell the same story."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vit_jax.data.embedded import open_embedded, scene, shapes
from vit_jax.data.embedded.outlines import OUTLINES

SEEDS = range(12)


@pytest.fixture(scope="module")
def scenes():
  return [scene(seed, size=96, num_objects=2 + seed % 5, t=0.3 * (seed % 3)) for seed in SEEDS]


def test_classes_are_the_shapes_of_the_instances(scenes):
  for drawn in scenes:
    assert drawn.instances.shape == drawn.classes.shape == drawn.depth.shape == drawn.image.shape[:2] == (96, 96)
    assert (drawn.classes[drawn.instances == 0] == 0).all()
    for k, item in enumerate(drawn.objects):
      assert (drawn.classes[drawn.instances == k + 1] == 1 + shapes.SHAPES.index(item.shape)).all()
      assert item.area == (drawn.instances == k + 1).sum()


def test_boxes_are_tight_around_the_visible_pixels(scenes):
  for drawn in scenes:
    for k, item in enumerate(drawn.objects):
      mask = drawn.instances == k + 1
      if item.box is None:
        assert not mask.any()
        continue
      x0, y0, x1, y1 = item.box
      inside = mask[y0:y1, x0:x1]
      assert inside.sum() == mask.sum()
      assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_depth_is_that_of_the_object_each_pixel_shows(scenes):
  for drawn in scenes:
    assert (drawn.depth[drawn.instances == 0] == shapes.BACKGROUND_DEPTH).all()
    depths = [item.depth for item in drawn.objects]
    assert depths == sorted(depths)
    for k, item in enumerate(drawn.objects):
      shown = drawn.depth[drawn.instances == k + 1]
      assert (shown <= item.depth + 1e-4).all() and (shown >= item.depth * (1 - shapes.BULGE) - 1e-4).all()


def test_nearer_object_hides_the_farther():
  # Draw the nearer objects alone: where they are, the full scene must show them and nothing farther.
  hidden = 0
  for seed in SEEDS:
    plans, light = shapes._plan((seed,), 5, None)
    full = scene(seed, num_objects=5)
    for k in range(1, 5):
      canvas = shapes._Canvas.of(np.zeros((64, 64, 3), np.float32))
      canvas.paint(plans[k], k + 1, 0.0, light)
      alone = canvas.finish(plans, 0.0, "noise").instances == k + 1
      shown = full.instances[alone]
      assert ((shown >= 1) & (shown <= k + 1)).all()
      hidden += (shown <= k).sum()
  assert hidden > 0


def test_no_object_can_be_nearer_than_the_one_before_it():
  for num in (2, 8, shapes.MOST_OBJECTS):
    plans, _ = shapes._plan((0,), num, None)
    depths = np.array([shapes.FOCAL / plan.radius for plan in plans])
    assert (depths[1:] * (1 - shapes.BULGE) > depths[:-1]).all()
    assert depths[-1] < shapes.BACKGROUND_DEPTH


def test_pixels_show_the_color_of_the_object():
  for seed in SEEDS:
    drawn = scene(seed, size=96, num_objects=1)
    (item,) = drawn.objects
    mean = drawn.image[drawn.instances == 1].astype(float).mean(0)
    wanted = np.array(shapes.COLORS[item.color])
    assert np.dot(mean, wanted) / np.linalg.norm(mean) / np.linalg.norm(wanted) > 0.93, item


def test_caption_names_every_visible_object(scenes):
  for drawn in scenes:
    for item in drawn.objects:
      named = f"a {item.texture} {item.color} {item.shape}" in drawn.caption
      assert named or not item.area
    assert drawn.caption.endswith("on noise")


def test_hidden_object_is_not_named_and_has_no_box():
  hidden = [(drawn, item) for seed in range(40) for drawn in [scene(seed, size=32, num_objects=20)]
            for item in drawn.objects if not item.area]  # fmt: skip
  assert hidden
  for drawn, item in hidden:
    same = [o for o in drawn.objects if (o.shape, o.texture, o.color) == (item.shape, item.texture, item.color)]
    visible = sum(o.area > 0 for o in same)
    assert item.box is None
    assert drawn.caption.count(f"a {item.texture} {item.color} {item.shape}") == visible


def test_scene_at_time_zero_is_the_still_scene():
  still, start = scene(3), scene(3, t=0.0)
  for field in dataclasses.fields(still):
    np.testing.assert_array_equal(getattr(still, field.name), getattr(start, field.name))


def test_objects_move_steadily_and_stay_inside():
  for seed in SEEDS:
    centers = np.array([[item.center for item in scene(seed, num_objects=2, t=t).objects]
                        for t in np.linspace(0, 12, 25)]) / 64  # fmt: skip
    steps = np.linalg.norm(np.diff(centers, axis=0), axis=-1)  # [24, 2]  half a unit of time each
    assert (steps.max(0) > 0.02).all() and (steps <= 0.1 + 1e-9).all()
    for t in (3.0, 12.0):
      drawn = scene(seed, size=96, num_objects=1, t=t)
      assert not drawn.instances[[0, -1]].any() and not drawn.instances[:, [0, -1]].any()


def test_motion_moves_the_masks_and_leaves_the_background():
  for seed in SEEDS:
    first, second = scene(seed, t=0.0), scene(seed, t=0.6)
    assert (first.instances != second.instances).mean() > 0.01
    assert [o.shape for o in first.objects] == [o.shape for o in second.objects]
    assert [o.depth for o in first.objects] == [o.depth for o in second.objects]
    untouched = np.ones((64, 64), bool)
    for drawn in (first, second):  # beside an edge, and before a thin tip, a pixel may hold a sample of the object
      covered = drawn.instances > 0
      for axis in (0, 1) * 3:
        covered = covered | np.roll(covered, 1, axis) | np.roll(covered, -1, axis)
      untouched &= ~covered
    np.testing.assert_array_equal(first.image[untouched], second.image[untouched])


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_covers_the_area_of_the_unit_circle(name):
  axis = np.linspace(-2, 2, 400, dtype=np.float32)
  x, y = np.meshgrid(axis, axis)
  inside = OUTLINES[name].distance(x, y) < 0
  assert inside.mean() * 16 == pytest.approx(np.pi, rel=0.02)
  assert np.hypot(x, y)[inside].max() <= OUTLINES[name].extent


def test_star_has_five_straight_points():
  angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
  star = OUTLINES["star"]
  reach = np.linspace(0, star.extent, 600, dtype=np.float32)
  x, y = (np.outer(f(angles), reach).astype(np.float32) for f in (np.cos, np.sin))
  rim = reach[(star.distance(x, y) < 0).sum(1) - 1]  # [720]  how far the shape goes each way
  tips = (rim > np.roll(rim, 1)) & (rim >= np.roll(rim, -1)) & (rim > 0.9 * rim.max())
  assert tips.sum() == 5
  assert rim.min() / rim.max() == pytest.approx(0.42, abs=0.02)
  # The middle of an edge lies on the straight line from tip to notch; a petal's would bulge beyond it.
  tip, notch = rim.max() * np.array([1, 0]), rim.min() * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
  middle = (tip + notch) / 2
  direction = np.argmax(rim) * np.pi / 360 + np.arctan2(middle[1], middle[0])
  assert rim[int(round(direction * 360 / np.pi)) % 720] == pytest.approx(np.linalg.norm(middle), rel=0.03)


def test_label_is_the_shape_of_the_largest_object(tmp_path):
  data = open_embedded("embedded:shapes/test?count=40&objects=4", cache_dir=tmp_path)
  assert np.bincount(data.labels, minlength=10).tolist() == [4] * 10
  for index in (0, 11, 39):
    drawn = scene((1, 0, index), num_objects=4, shape=data.class_names[data.labels[index]])
    np.testing.assert_array_equal(drawn.image, data.images[index])
    sizes = [item.area for item in drawn.objects]
    assert drawn.objects[int(np.argmax(sizes))].shape == data.class_names[data.labels[index]]
  for seed in range(30):  # the asked-for shape is always the largest one's
    assert scene(seed, num_objects=6, shape="ring").label == shapes.SHAPES.index("ring")


def test_same_seed_same_scene_and_other_seed_another():
  assert scene(5).caption == scene(5).caption
  np.testing.assert_array_equal(scene(5).image, scene((5,)).image)
  assert (scene(5).image != scene(6).image).any()


@pytest.mark.parametrize(("arguments", "expected"), [
  ({"background": "sky"}, "noise, photo"),
  ({"shape": "blob"}, "circle, ring"),
  ({"num_objects": 0}, "1 to 20"),
])  # fmt: skip
def test_errors_name_what_would_be_right(arguments, expected):
  with pytest.raises(ValueError, match=expected):
    scene(0, **arguments)
