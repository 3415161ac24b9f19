"""The released code's arithmetic against vectors produced by that code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoprune.contract import Observation
from autoprune.parts.scorers import text_attention
from autoprune.policy.cost import released_prefill_macs
from autoprune.policy.released import (
    cluster_and_merge,
    cluster_count,
    dynamic_slope,
    first_cut_count,
    recycled_count,
    released_keep_fractions,
    released_runtime_counts,
)
from tests.golden_data import golden_functions


def rows(counts):
    return [list(row) for row in zip(counts.kept, counts.clusters, counts.leaving, strict=True)]


def test_dynamic_slope_matches_exactly():
    for entry in golden_functions("dynamic_k"):
        assert dynamic_slope(entry["mi"], entry["k0"], entry["gamma"]) == entry["k"]


def test_schedules_match_in_every_count():
    entries = golden_functions("schedule")
    for entry in entries:
        total, target = entry["num_visual"], entry["target"]
        assert first_cut_count(target, total) == entry["n1"]
        found = released_keep_fractions(
            entry["num_layers"], total, target, entry["n1"], entry["x0"], entry["k"]
        )
        assert found.early_return == entry["early_return"]
        assert found.precheck_sum == entry["precheck_sum"]
        # The vectors' exponentials differ from numpy's in the last bit here and there.
        assert found.scale == pytest.approx(entry["scale"], rel=1e-14)
        np.testing.assert_allclose(found.fractions, entry["keep_fraction"], rtol=1e-14)
        assert rows(found.planned) == entry["search_kept_clusters_out"]
        assert sum(found.planned.leaving) == entry["search_total"]
        ran = released_runtime_counts(entry["n1"], found.fractions, total)
        assert rows(ran) == entry["runtime_kept_clusters_out"]
        assert np.mean(ran.leaving) == pytest.approx(entry["runtime_mean_out"])
        assert np.mean(ran.entering(total)) == pytest.approx(entry["runtime_mean_in"])
    assert any(entry["early_return"] for entry in entries)
    assert any(max(entry["keep_fraction"]) > 1 for entry in entries)


def test_planning_without_recycling_loses_nothing_to_merged_tokens():
    plan = released_keep_fractions(32, 576, 64, 160, 14.9, 0.2, recycle=False)
    assert set(plan.planned.clusters) == {0}
    assert abs(sum(plan.planned.leaving) - 32 * 64) <= 16
    ran = released_runtime_counts(160, plan.fractions, 576, recycle=False)
    assert ran.kept == ran.leaving
    with_merging = released_keep_fractions(32, 576, 64, 160, 14.9, 0.2)
    assert plan.fractions[5] > with_merging.fractions[5]


def test_fractions_above_one_are_planned_one_short_and_run_in_full():
    plan = released_keep_fractions(12, 64, 64, 64, 14.9, 0.0, recycle=False)
    assert plan.fractions.max() > 1
    assert plan.planned.kept[1] == 63
    assert released_runtime_counts(64, plan.fractions, 64, recycle=False).kept[1] == 64


def test_recycled_and_cluster_counts():
    assert [recycled_count(d) for d in (0, 1, 3, 4, 100)] == [0, 1, 1, 2, 31]
    assert [cluster_count(m) for m in (0, 1, 9, 10, 19, 20)] == [0, 1, 1, 2, 2, 3]


def test_a_single_layer_has_no_schedule():
    with pytest.raises(ValueError, match="num_layers must be at least 2, got 1"):
        released_keep_fractions(1, 576, 64, 160, 14.9, 0.2)


@pytest.mark.parametrize("entry", golden_functions("attn_rank"), ids=lambda e: str(e["num_visual"]))
def test_the_text_s_attention_ranks_as_released(entry):
    start, present = entry["prompt_len_before_image"], entry["num_visual"]
    block = torch.tensor(entry["attn"])[None, :, start + present :, start : start + present]
    seen = Observation(
        cut=2,
        counts=[present],
        index=torch.arange(present)[None],
        mask=torch.ones(1, present, dtype=torch.bool),
        attention=block,
        text_mask=torch.ones(block.shape[::2], dtype=torch.bool),
    )
    (scores,) = text_attention(seen)
    torch.testing.assert_close(scores, torch.tensor(entry["scores"]), rtol=1e-6, atol=1e-7)
    n1 = entry["base_count"]
    kept = min(released_runtime_counts(n1, np.array([entry["keep_fraction"]]), n1).kept[1], present)
    assert kept == entry["kept"]
    assert scores.topk(kept).indices.sort().values.tolist() == entry["kept_positions"]


def cluster_name(entry):
    return f"m{entry['m']}-K{entry['num_clusters']}-{'noise' if entry['noise_u'] else 'quiet'}"


@pytest.mark.parametrize("entry", golden_functions("cluster_and_merge"), ids=cluster_name)
def test_clusters_match(entry):
    noise = None if entry["noise_u"] is None else torch.tensor(entry["noise_u"])
    centers, assign, merged = cluster_and_merge(
        torch.tensor(entry["x"]), entry["num_clusters"], noise
    )
    expected = entry["centers_native_order"]
    expected_assign = torch.tensor(entry["assign_native_order"])
    expected_merged = torch.tensor(entry["merged_native_order"])
    if entry["tie_between_selected_centers"]:
        # Equal centres come by index here, in the order of a top-k there: undo the renaming.
        renamed = torch.tensor([expected.index(center) for center in sorted(expected)])
        assert centers.tolist() == sorted(expected)
        expected_assign = renamed.argsort()[expected_assign]
        expected_merged = expected_merged[renamed]
    elif not entry["tie_at_selection_boundary"]:
        assert centers.tolist() == expected
    assert assign.tolist() == expected_assign.tolist()
    torch.testing.assert_close(merged, expected_merged, rtol=1e-6, atol=1e-6)


def test_equal_centre_scores_go_to_the_lowest_index():
    corners = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]])
    centers, assign, merged = cluster_and_merge(corners, 2)
    assert centers.tolist() == [0, 1]
    assert assign.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(merged, torch.tensor([[1.0, 0.0], [1.0, 2.0]]))


def test_duplicate_tokens_still_fill_every_cluster():
    centers, assign, merged = cluster_and_merge(torch.ones(7, 4), 3)
    assert sorted(set(assign.tolist())) == [0, 1, 2]
    assert assign[centers].tolist() == [0, 1, 2]
    torch.testing.assert_close(merged, torch.ones(3, 4))


def test_clustering_refuses_more_clusters_than_tokens():
    with pytest.raises(ValueError, match="1 <= num_clusters <= m"):
        cluster_and_merge(torch.rand(3, 4), 4)


def test_flops_match_the_released_counter():
    for entry in golden_functions("flops"):
        text, total = entry["text_total"], entry["num_visual"]
        n1 = first_cut_count(entry["target"], total)
        plan = released_keep_fractions(
            entry["num_layers"], total, entry["target"], n1, entry["x0"], entry["k"]
        )
        visual = released_runtime_counts(n1, plan.fractions, total).entering(total)
        assert list(visual) == entry["visual_in_per_layer"]
        shape = entry["hidden"], entry["intermediate"]
        assert released_prefill_macs(np.array(visual) + text, *shape) == entry["pruned_ops"]
        dense = released_prefill_macs([total + text] * entry["num_layers"], *shape)
        assert dense == entry["dense_ops"]
        assert 100 * (1 - entry["pruned_ops"] / dense) == pytest.approx(entry["reduction_percent"])
