"""Panels, maps and animations show exactly what the record of a prompt says."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from autoprune import create, viz
from autoprune.methods.looking import look
from autoprune.trace import Sample
from autoprune.viz import View
from autoprune.viz.depth import MOST_VIEWS
from tests import zoo
from tests.viz.test_patches import sample

RED, BLUE = (200, 30, 30), (30, 30, 200)


def plain(colour, width=64, height=64):
    return Image.new("RGB", (width, height), colour)


def pixels(axes):
    return np.asarray(axes.images[0].get_array()).astype(int)


def shown(axes, view, colour):
    """The tokens whose middle is drawn in the picture's own colour."""
    drawn, (rows, columns) = pixels(axes), view.tokens.shape
    height, width = drawn.shape[:2]
    return {
        int(view.tokens[row, column])
        for row in range(rows)
        for column in range(columns)
        if (
            drawn[int((row + 0.5) * height / rows), int((column + 0.5) * width / columns)] == colour
        ).all()
    }


def test_patches_drawn_are_those_of_a_real_trace():
    model = zoo.build("llava")
    with create("autoprune", budget=6)(model) as trace:
        model.generate(**zoo.inputs("llava", model), max_new_tokens=1)
    (record,) = trace.samples
    view = View.whole(plain(RED), (4, 4))
    layers = list(range(zoo.LAYERS))
    figure = viz.kept_over_depth([view], record, layers)
    assert len({len(kept) for kept in record.kept}) > 2
    for layer, axes in zip(layers, figure.axes[1:], strict=True):
        assert shown(axes, view, RED) == set(record.kept[layer].tolist())


def test_tokens_of_several_pictures_are_drawn_in_their_own():
    places = np.array([[p, r, c] for p in (3, 8) for r in range(2) for c in range(2 + (p == 8))])
    places = np.insert(places.astype(np.float32), 4, np.nan, axis=0)  # an end of a row between
    views = viz.views_of([plain(RED), plain(BLUE, 96)], places)
    assert views[0].tokens.tolist() == [[0, 1], [2, 3]]
    assert views[1].tokens.tolist() == [[5, 6, 7], [8, 9, 10]]
    figure = viz.kept_over_depth(views, sample([range(11), [1, 4, 6, 10]], 11), [1])
    _, first, _, second = figure.axes
    assert shown(first, views[0], RED) == {1}
    assert shown(second, views[1], BLUE) == {6, 10}


def test_frames_of_a_video_and_several_pictures_are_views_of_their_own():
    model = zoo.build("qwen2_vl")
    inputs = zoo.inputs("qwen2_vl", model, media="video")
    # Two frames of 4 x 8 patches, 2 x 2 of which make a token.
    frames = viz.views_of([plain(RED), plain(BLUE)], look(model, inputs).places.numpy())
    assert [view.tokens.tolist() for view in frames] == [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[8, 9, 10, 11], [12, 13, 14, 15]],
    ]
    inputs = zoo.inputs("qwen2_vl", model, "padded3", only=2)
    # Pictures of 4 x 12 and 8 x 8 patches.
    pictures = viz.views_of([plain(RED), plain(BLUE)], look(model, inputs).places.numpy())
    assert pictures[0].tokens.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert pictures[1].tokens[3].tolist() == [24, 25, 26, 27]


def test_of_many_frames_some_are_drawn_and_the_title_says_so():
    views = [View.whole(plain(RED), (1, 1), first) for first in range(20)]
    figure = viz.kept_over_depth(views, sample([range(20)], 20), [0], title="what?")
    assert len(figure.axes) == 2 * MOST_VIEWS
    assert figure.get_suptitle() == "6 of 20 pictures. what?"


def test_an_animation_has_a_frame_for_each_layer():
    record = sample([range(16), range(12), [2, 5], [5]])
    content = viz.animate_kept([View.whole(plain(RED), (4, 4))], record, size=64)
    movie = Image.open(io.BytesIO(content))
    assert movie.format == "WEBP" and movie.n_frames == 4
    for layer in range(4):
        movie.seek(layer)
        frame = np.asarray(movie.convert("RGB")).astype(int)
        for token in range(16):
            y, x = (viz.GAP + 16 * part + 8 for part in divmod(token, 4))
            red = frame[y, x, 0] - frame[y, x, 1] > 80
            assert red == (token in record.kept[layer].tolist()), (layer, token)


def test_the_summary_is_tinted_where_it_stands_for_patches_and_framed_at_its_place():
    record = sample([range(16), [1, 5, 9], [1, 5]])
    record.summary_token = 5
    view = View.whole(plain(RED), (4, 4))
    figure = viz.summary_over_depth([view], record, [0, 1, 2])
    _, before, middle, last = figure.axes
    assert shown(before, view, RED) == set(range(16))
    assert shown(middle, view, RED) == {1, 9}
    assert shown(last, view, RED) == {1}
    # Panels have 320 pixels: the frame of patch 5 begins at (80, 80).
    assert pixels(middle)[81, 100].tolist() == [0, 0x72, 0xB2]
    assert [axes.get_xlabel() for axes in figure.axes[1:]] == [
        "into layer 0: none dropped yet",
        "into layer 1: for 14 of 16",
        "into layer 2: for 15 of 16",
    ]


def test_without_a_summary_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match='prune it with merger="summary"'):
        viz.summary_over_depth([View.whole(plain(RED), (4, 4))], sample([range(16)]))


@pytest.mark.parametrize("dark", [False, True])
def test_dark_paper_is_dark_also_behind_dropped_patches(dark):
    view = View.whole(plain(RED), (4, 4))
    figure = viz.kept_over_depth([view], sample([range(16), [0]]), [1], dark=dark)
    assert (sum(figure.get_facecolor()[:3]) < 1) == dark
    assert (pixels(figure.axes[1])[300, 300].max() < 128) == dark


def test_what_does_not_fit_is_refused():
    record, view = sample([range(16), [1]]), View.whole(plain(RED), (4, 4))
    with pytest.raises(ValueError, match=r"between 0 and 1, got \[2\]"):
        viz.kept_over_depth([view], record, [2])
    with pytest.raises(ValueError, match="up to number 24, and the prompt has 16"):
        viz.kept_over_depth([View.whole(plain(RED), (5, 5))], record)
    with pytest.raises(ValueError, match="lie on 1 pictures, tiles or frames, got 2 images"):
        viz.views_of([plain(RED)] * 2, np.zeros((1, 3), np.float32))


def test_attention_lines_are_those_of_the_look():
    model = zoo.build("llava")
    values = look(model, zoo.inputs("llava", model)).attention.numpy()
    axes = viz.attention_over_depth(values).axes[0]
    gets, holds = (line.get_ydata() for line in axes.lines)
    for layer, row in enumerate(values.astype(float)):
        assert gets[layer] == pytest.approx(sum(row))
        held = count = 0
        for value in sorted(row, reverse=True):
            held, count = held + value, count + 1
            if held >= sum(row) / 2:
                break
        assert holds[layer] == count / 16


def test_a_map_shows_the_attention_of_its_layer_scaled_to_its_largest():
    values = np.zeros((3, 16))
    values[2, [6, 9]] = 0.4, 0.1
    view = View.whole(plain(RED), (4, 4))
    figure = viz.attention_over_depth(values + 1e-15, [view], [2])
    heat = figure.axes[0].images[1].get_array()
    assert heat[1, 2] == pytest.approx(1) and heat[2, 1] == pytest.approx(0.5)
    assert np.delete(heat.flatten(), [6, 9]).max() < 1e-6


def test_attention_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"got the shape \(4,\)"):
        viz.attention_over_depth(torch.ones(4))


def test_half_is_held_by_half_of_equal_tokens():
    assert viz.half_of_attention(np.full((1, 10), 0.1)).tolist() == [0.5]


def test_a_prompts_curve_stands_between_the_two_ends():
    ends = (0.2, [16, 8, 4]), (0.9, [16, 6, 6])
    axes = viz.retention_curves(ends[0], (0.5, [16, 7, 5]), ends[1]).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {
        "least information: 0.200 bits": [16, 8, 4],
        "most information: 0.900 bits": [16, 6, 6],
        "this prompt: 0.500 bits": [16, 7, 5],
    }
    with pytest.raises(ValueError, match=r"got \[2, 3\] layers"):
        viz.retention_curves((0.2, [1, 1]), (0.5, [16, 7, 5]), ends[1])


def test_the_flat_schedule_spends_the_same():
    axes = viz.tokens_against_flat(sample([range(16), range(6), range(2)])).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [16, 6, 2]
    assert sum(axes.lines[0].get_ydata()) == 24
    empty = Sample(0, 5, torch.arange(0), [0], [torch.arange(0)], None, [0], 1.0, 1.0, 1, 1)
    with pytest.raises(ValueError, match="no visual tokens"):
        viz.tokens_against_flat(empty)


def test_kinds_are_sorted_by_their_information():
    rows = [
        {"method": "full", "mutual_information_count": None, "mutual_information_colour": None},
        {"method": "autoprune", "mutual_information_count": 0.6, "mutual_information_colour": 0.2},
    ]
    axes = viz.information_by_kind({"rows": rows}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["colour", "count"]
    assert [bar.get_width() for bar in axes.patches] == [0.2, 0.6]
    with pytest.raises(ValueError, match="no method of these results measured"):
        viz.information_by_kind({"rows": rows[:1]})
    with pytest.raises(ValueError, match="no method 'x' in the results; they have full, autoprune"):
        viz.information_by_kind({"rows": rows}, "x")
