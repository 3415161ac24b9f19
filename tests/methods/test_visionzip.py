"""VisionZip against dominant and contextual tokens picked and merged one by one."""

from __future__ import annotations

import numpy as np
import pytest

from autoprune.methods.visionzip import VisionZip
from tests.methods.prompts import choices, cosines, mixed, observation, prompt


def dominant_and_contextual(p, count, share):
    number = round(count * share)
    ranking = sorted(p.real, key=lambda i: -p.attention[i])
    dominant, rest = ranking[: count - number], sorted(ranking[count - number :])
    step = max(1, len(rest) // number) if number else 1
    targets = rest[::step][:number]
    groups = {i: [i] for i in dominant + targets}
    for i in rest:
        if targets and i not in targets:
            groups[targets[int(cosines(p.keys[i : i + 1], p.keys[targets])[0].argmax())]].append(i)
    for i in range(len(p.hidden)):
        if len(groups) < count and i not in p.real:
            groups[i] = [i]
    return {i: p.hidden[group].mean(axis=0) for i, group in sorted(groups.items())}


@pytest.mark.parametrize("contextual", [10 / 64, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_kept_or_merged_into_the_target_with_the_likest_key(seed, contextual):
    prompts, counts = mixed(seed)
    found = choices(VisionZip(8, contextual=contextual), prompts, counts)
    for p, count, (kept, states) in zip(prompts, counts, found, strict=True):
        expected = dominant_and_contextual(p, count, contextual)
        assert kept == list(expected)
        if count:
            np.testing.assert_allclose(states, list(expected.values()), atol=1e-5)


def test_of_64_tokens_54_stay_as_they_are():
    p = prompt((24, 24))
    ((kept, states),) = choices(VisionZip(64), [p], [64])
    assert (
        sum(np.array_equal(p.hidden[i], state) for i, state in zip(kept, states, strict=True)) == 54
    )


def test_settings_out_of_range_are_refused_and_named():
    with pytest.raises(ValueError, match="contextual"):
        VisionZip(8, contextual=1.1)


def test_a_tower_without_keys_is_named():
    seen = observation([prompt((3, 3))])
    seen.vision_keys = None
    with pytest.raises(ValueError, match="vision keys"):
        VisionZip(8).choose(seen, [4], None)
