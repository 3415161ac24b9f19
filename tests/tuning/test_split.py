"""Nothing is judged on what was tuned on, nor on its pictures."""

from __future__ import annotations

import pytest
from PIL import Image

from autoprune.evaluation.tasks import Task
from autoprune.tuning.split import PARTS, split


def prompts(pictures, each=1):
    return [
        Task(
            f"{p}-{q}",
            "all",
            f"question {q}?",
            (),
            Image.new("RGB", (2, 2), (p % 256, p // 256, 9)),
        )
        for p in range(pictures)
        for q in range(each)
    ]


@pytest.mark.parametrize(("pictures", "each"), [(20, 1), (41, 1), (30, 7), (400, 2)])
def test_halves_share_no_picture_and_hold_every_prompt(pictures, each):
    given = prompts(pictures, each)
    found = split(given, seed=3)
    tuned = [task for part in found.tuning for task in part]
    assert sorted(t.id for t in (*tuned, *found.held_out)) == sorted(t.id for t in given)
    colours = [{task.image.getpixel((0, 0)) for task in own} for own in (tuned, found.held_out)]
    assert not colours[0] & colours[1]
    assert abs(len(tuned) - len(found.held_out)) <= each
    assert found.tuned_on == len(tuned)
    sizes = [len(part) for part in found.tuning]
    assert len(sizes) == PARTS and max(sizes) - min(sizes) <= 1
    # One number for each picture.
    pairs = {
        (task.image.getpixel((0, 0)), number)
        for task, number in zip(found.held_out, found.pictures, strict=True)
    }
    assert len(pairs) == len(colours[1]) == len(set(found.pictures))


def test_the_seed_decides():
    given = prompts(40)
    assert split(given, 1) == split(given, 1)
    assert split(given, 1).held_out != split(given, 2).held_out
    assert split(given[::-1], 1).pictures == split(given, 1).pictures


@pytest.mark.parametrize(("pictures", "each"), [(0, 1), (1, 500), (19, 1), (19, 40)])
def test_too_few_are_refused(pictures, each):
    said = f"prompts about 20 pictures or more.*got {pictures * each} about {pictures}"
    with pytest.raises(ValueError, match=said):
        split(prompts(pictures, each), 0)
