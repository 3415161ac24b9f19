"""Pictures show what the trace says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from autoprune import viz
from autoprune.trace import Sample, Trace


def sample(kept, num_visual=16, tokens=None):
    kept = [torch.tensor(sorted(indices)) for indices in kept]
    tokens = tokens or [len(indices) for indices in kept]
    positions = torch.arange(num_visual)
    return Sample(num_visual, 5, positions, tokens, kept, 0.5, tokens, 1.0, 2.0, 1, 2)


@pytest.fixture
def image():
    return Image.fromarray(np.full((64, 64, 3), (200, 30, 30), dtype=np.uint8))


def panel(sheet, index, size):
    left, top = viz.GAP + index * (size + viz.GAP), viz.GAP
    return np.asarray(sheet.crop((left, top, left + size, top + size)))


def test_kept_patches_keep_their_colour_and_dropped_ones_are_veiled(image):
    sheet = viz.kept_patches(image, sample([range(16), [5]]), layers=[1], size=64)
    full, pruned = panel(sheet, 0, 64), panel(sheet, 1, 64)
    assert (full == (200, 30, 30)).all()
    # Patch 5 is row 1, column 1: pixels 16 to 31, away from its border.
    assert (pruned[20:28, 20:28] == (200, 30, 30)).all()
    dropped = pruned[40:60, 40:60].astype(int)
    assert dropped.min() > 200
    assert np.ptp(dropped) == 0


def test_the_border_runs_between_kept_and_dropped_only(image):
    everything = viz.kept_patches(image, sample([range(16)]), layers=[0], size=64)
    inside = panel(everything, 1, 64)[3:-3, 3:-3]
    assert (inside == (200, 30, 30)).all()


def test_layers_are_panels_of_equal_size(image):
    three = viz.kept_patches(image, sample([range(16), [1, 2], [1]]))
    two = viz.kept_patches(image, sample([range(16), [1, 2], [1]]), layers=[1])
    assert three.width - two.width == 200 + viz.GAP
    assert three.height == two.height


def test_a_grid_may_be_wider_than_high():
    wide = Image.new("RGB", (80, 40), (0, 90, 0))
    sheet = viz.kept_patches(wide, sample([range(8), [7]], num_visual=8), (2, 4), [1], size=80)
    right_bottom = np.asarray(sheet)[viz.GAP + 25 : viz.GAP + 35, viz.GAP * 2 + 80 + 65 :][:, :10]
    assert (right_bottom == (0, 90, 0)).all()


def test_long_titles_are_shortened_to_the_panels(image):
    short = viz.kept_patches(image, sample([range(16)]), layers=[0], title="what is this?")
    long = viz.kept_patches(image, sample([range(16)]), layers=[0], title="what is this? " * 50)
    assert short.size == long.size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (3, 5)}, "3 x 5 patches does not hold 16"),
        ({"layers": [2]}, "between 0 and 1"),
        ({"layers": [-1]}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_drawn(image, arguments, message):
    with pytest.raises(ValueError, match=message):
        viz.kept_patches(image, sample([range(16), [1]]), **arguments)


def test_several_square_pictures_are_not_drawn_as_one(image):
    four = sample([range(64)], num_visual=64)
    four.visual_positions = torch.cat([torch.arange(16) + start for start in (5, 22, 39, 56)])
    message = (
        r"64 visual tokens stand in 4 pieces \(16, 16, 16, 16\), .* pass grid=\(rows, columns\)"
    )
    with pytest.raises(ValueError, match=message):
        viz.kept_patches(image, four)
    whole = sample([range(64)], num_visual=64)
    sheet = viz.kept_patches(image, four, grid=(8, 8))
    assert (np.asarray(sheet) == np.asarray(viz.kept_patches(image, whole))).all()


def test_rows_of_one_picture_may_stand_apart(image):
    rows = sample([range(16), [5]])
    rows.visual_positions = torch.cat([torch.arange(4) + start for start in (1, 6, 11, 16)])
    sheet = viz.kept_patches(image, rows)
    assert (
        np.asarray(sheet) == np.asarray(viz.kept_patches(image, sample([range(16), [5]])))
    ).all()


def test_a_file_name_is_no_picture():
    with pytest.raises(ValueError, match=r"pass what Image.open\('a.png'\) gives"):
        viz.kept_patches("a.png", sample([range(16)]))
    with pytest.raises(ValueError, match=r"got ndarray; pass what Image.open or Image.fromarray"):
        viz.kept_patches(np.zeros((4, 4, 3), np.uint8), sample([range(16)]))


def test_a_whole_trace_is_no_sample(image):
    with pytest.raises(ValueError, match=r"got Trace; pass trace.samples\[0\]"):
        viz.kept_patches(image, Trace())


def test_tokens_that_form_no_square_need_a_grid(image):
    with pytest.raises(ValueError, match=r"pass grid=\(rows, columns\)"):
        viz.kept_patches(image, sample([range(8)], num_visual=8))


def test_tiles_fill_column_by_column():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = viz.tile([Image.new("RGB", (4, 2), colour) for colour in colours], columns=2)
    assert sheet.size == (8, 4)
    assert [sheet.getpixel(at) for at in ((0, 0), (0, 2), (4, 0))] == colours


def test_a_plot_has_a_line_per_schedule_and_one_for_the_budget():
    axes = viz.plot_schedule([[16, 8, 4], [16, 6, 6]], ["hard", "easy"], budget=9).axes[0]
    assert [line.get_label() for line in axes.lines] == ["hard", "easy", "budget 9"]
    assert list(axes.lines[1].get_ydata()) == [16, 6, 6]


def test_a_plot_needs_one_label_per_schedule():
    with pytest.raises(ValueError, match="2 schedules and 1 labels"):
        viz.plot_schedule([[1], [1]], ["one"])


def test_both_kinds_of_pictures_become_png():
    for picture in (Image.new("RGB", (3, 3)), viz.plot_schedule([[4, 2]], ["x"])):
        assert viz.to_png(picture).startswith(b"\x89PNG")


def test_a_title_that_does_not_fit_is_left_out():
    narrow, kept = Image.new("RGB", (50, 1000)), sample([range(16)])
    assert viz.kept_patches(narrow, kept, layers=[], title="hello").width < 50
