"""`autoprune bench` measures what it is asked to, shows it and keeps it."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from PIL import Image

from autoprune import AutoPrune, Budget
from autoprune.bench import session
from autoprune.bench.subjects import CONFIGURATIONS
from autoprune.bench.variants import HOOKS, OVERHEADS
from tests.cli.conftest import LAYERS, VISUAL


@pytest.fixture
def measure(call, model_folder):
    """`autoprune bench` on the small checkpoint, one round of one step unless told."""

    def run(*words):
        once = () if "--quick" in words else ("--repeats", 1, "--new-tokens", 1)
        fixed = ("--model", model_folder, "--text", 8, *once)
        return call("bench", *fixed, *(() if "--batch" in words else ("--batch", 1)), *words)

    return run


def test_json_holds_every_figure_and_what_it_was_measured_on(measure):
    record = measure("--budget", "1/2,40", "--batch", "1,2", "--json").record
    assert record["command"].startswith("autoprune bench --model ")
    assert "--batch 1,2" in record["command"] and "--json" not in record["command"]
    assert record["model"]["layers"] == LAYERS and record["model"]["dtype"] == "float32"
    assert record["machine"]["clock"] == "process time" and record["machine"]["threads"] == 1
    assert {"autoprune", "python", "torch", "transformers"} == set(record["versions"])
    assert 0 < record["policy_seconds"]["one_prompt"] < record["policy_seconds"]["batch_of_64"]
    pruned = [row for row in record["rows"] if row["kind"] == "pruned"]
    asked = [(b, m, t) for b in (1, 2) for m in ("autoprune", "random") for t in (VISUAL / 2, 40)]
    assert [(row["batch"], row["variant"], row["mean_tokens"]) for row in pruned] == asked
    for row in pruned:
        share = row["speedup"]["prefill"]["median"] * row["flops"] / row["flops_full"]
        assert row["realised_share"] == pytest.approx(share)
        assert row["kv_bytes_held"] == pytest.approx(row["kv_bytes"] * (1 + row["padding_waste"]))
        assert set(row["seconds"]) == {"vision", "prefill", "ttft", "decode"}
        assert row["peak_bytes"] == pytest.approx(row["peak_bytes_trace"], rel=0.2)
        assert row["floor_share"] > 0
        assert row["launches_ratio"] > 1 and row["copies"] >= 1
    overheads = [row for row in record["rows"] if row["kind"] == "overhead"]
    of_each = [(name, of) for of in ("autoprune", "random") for name in OVERHEADS[1:]]
    assert [(row["variant"], row.get("of")) for row in overheads] == [(HOOKS, None), *of_each]


def test_the_tables_fit_80_characters(measure):
    out = measure("--budget", 40, "--repeats", 6).out
    assert all(word in out for word in ("plain", "autoprune", "hooks only", "random: cuts only"))
    tables = out[out.index("medians") : out.index("planning")]
    # Intervals are there: at least as many as there are rows of what is not plain.
    assert len(re.findall(r"\d\.\d+-\d+\.\d+", tables)) == 2 * 2 + 2 * 7
    assert re.search(r"plain +all +\d+ 1\.000 +0\n", tables)
    assert max(map(len, out.splitlines())) <= 80


def test_quick_means_less_unless_told(measure):
    quick = measure("--quick", "--budget", 40, "--json").record
    assert (quick["repeats"], quick["new_tokens"]) == (3, 4)
    assert {row["variant"] for row in quick["rows"] if row["kind"] == "pruned"} == {"autoprune"}
    told = measure("--quick", "--repeats", 2, "--budget", 40, "--method", "random", "--json").record
    assert (told["repeats"], told["new_tokens"]) == (2, 4)
    assert all(len(row["seconds"]["prefill"]["all"]) == 2 for row in told["rows"])


@pytest.mark.parametrize("target", ["new/folder", "speed.json"])
def test_figures_and_plot_are_written(measure, tmp_path, target):
    words = ("--method", "random", "--budget", "60,40", "--output", tmp_path / target, "--json")
    outcome = measure(*words)
    written = tmp_path / target if target.endswith("json") else tmp_path / target / "bench.json"
    assert json.loads(written.read_text()) == outcome.record
    with Image.open(written.with_suffix(".png")) as image:
        assert image.width > 600


def test_figures_need_no_matplotlib(measure, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = measure("--method", "random", "--budget", "40", "--output", tmp_path)
    assert outcome.code == 0
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert "no plot beside" in outcome.err and "pip install 'autoprune[demo]'" in outcome.err


def test_an_interruption_keeps_what_was_measured(measure, tmp_path, monkeypatch):
    # Four runs of layers alone warm up.
    once, left = session.time_once, iter(range(4 + 4))

    def interrupted(*words):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return once(*words)

    monkeypatch.setattr(session, "time_once", interrupted)
    outcome = measure("--budget", "60,40", "--output", tmp_path)
    assert outcome.code == 130
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert rows[0]["variant"] == "plain" and 3 <= len(rows) <= 4
    assert (tmp_path / "bench.png").exists()
    assert "autoprune" in outcome.out


def test_options_of_the_method_are_passed_on(measure):
    words = ("--budget", 30, "--method", "autoprune", "--set", "first_cut=pre_llm", "--json")
    record = measure(*words).record
    pruned = next(row for row in record["rows"] if row["kind"] == "pruned")
    assert max(pruned["tokens_per_layer"][0]) < VISUAL
    assert "--set first_cut=pre_llm" in record["command"]


def test_an_option_is_for_the_methods_that_have_it(measure):
    record = measure("--budget", 30, "--set", "first_cut=pre_llm", "--json").record
    pruned = [row for row in record["rows"] if row["kind"] == "pruned"]
    assert [row["variant"] for row in pruned] == ["autoprune", "random"]
    assert max(pruned[0]["tokens_per_layer"][0]) < VISUAL


def test_methods_are_given_as_to_compare(measure):
    methods = "stairs@autoprune:cut_every=4,k0=0.5,gamma=0,beta=0,autoprune"
    words = ("--budget", 30, "--method", methods, "--json")
    record = measure(*words, "--set", "k0=0.3").record
    stairs, smooth = (row for row in record["rows"] if row["kind"] == "pruned")
    assert [stairs["variant"], smooth["variant"]] == ["stairs", "autoprune"]
    (stairs,), (smooth,) = stairs["tokens_per_layer"], smooth["tokens_per_layer"]
    # Its own option goes before --set.
    own = AutoPrune(30, k0=0.5, gamma=0, beta=0, cut_every=4)
    assert stairs == own.plan(LAYERS, VISUAL, mutual_information=0)
    assert sum(stairs) == sum(smooth)
    assert len(set(stairs)) < len(set(smooth))
    assert f"--method {methods} " in record["command"]


def test_the_released_code_is_measured_at_its_own_kind_of_budget(measure):
    record = measure("--budget", 30, "--method", "autoprune_reference", "--json").record
    whole = next(row for row in record["rows"] if row["variant"] == "budget of all tokens")
    assert whole["mean_tokens"] == VISUAL


def test_a_full_memory_keeps_what_was_measured(measure, monkeypatch):
    # Ten variants of the first batch, and one of the second.
    once, left = session.hold_once, iter(range(11))

    def full(*words):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return once(*words)

    monkeypatch.setattr(session, "hold_once", full)
    outcome = measure("--budget", 40, "--batch", "1,2")
    assert outcome.code == 2 and "give smaller --batch" in outcome.err
    assert "autoprune" in outcome.out and "medians of 1 rounds of 1, stopped" in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "magic=1"), "has no option 'magic'"),
        (("--spread", "inf"), "--spread expects"),
        (("--method", "magic"), "there is no method 'magic'"),
        (("--method", ","), "--method is empty"),
        (("--method", "a@random,a@autoprune"), "the label 'a'"),
        (("--method", "cuts only@random"), "the label 'cuts only'"),
        (("--method", "plain@random"), "the label 'plain'"),
        (("--method", "@random"), "the label ''"),
        (("--budget", "64,0"), "budget '0'"),
        (("--budget", "1"), "smallest feasible budget"),
        (("--batch", "1,two"), "--batch expects whole numbers of 1 or more, got 'two'"),
        (("--batch", "0"), "--batch expects whole numbers"),
        (("--dtype", "float8"), "dtype must be one of"),
        (("--device", "abacus"), "device 'abacus' is not available"),
        (("--attention", "magic"), "magic"),
        (("--images", 2), "a checkpoint sees one picture"),
        (("--image", "no.png"), "there is no image file 'no.png'"),
        (("--question", " "), "the question is empty"),
        (("--model", "small", "--question", "what?"), "are for a checkpoint"),
        (("--model", "no/such/folder"), "there is no model folder"),
        (("--output", "no/bench.json"), "cannot write 'no/bench.json': there is no folder 'no'"),
        (("--output", "/proc/bench.json"), "cannot write '/proc"),
        (("--text", 10**9), "a prompt of 1000000000 tokens or more is longer than"),
    ],
)
def test_what_it_cannot_do(measure, words, message):
    outcome = measure(*(("--budget", 40) if "--budget" not in words else ()), *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.startswith("autoprune: ") and outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_an_unknown_model_is_told_of_the_built_in_ones(call):
    outcome = call("bench", "--model", "llava-7b")
    assert outcome.code == 2
    assert all(name in outcome.err for name in CONFIGURATIONS)


def test_a_prompt_that_is_too_long_is_refused_before_the_model_is_built(call):
    outcome = call("bench", "--text", 8000)
    assert outcome.code == 2
    assert "a prompt of 8576 tokens or more is longer than the 8192 that small takes" in outcome.err


def test_a_checkpoints_own_prompts_have_shares_and_their_own_information(measure):
    record = measure("--method", "random", "--json").record
    pruned = [row for row in record["rows"] if row["kind"] == "pruned"]
    assert [row["budget"] for row in pruned] == [str(Budget.ratio(n / 9)) for n in (3, 2, 1)]
    words = ("--method", "autoprune", "--budget", 40, "--batch", 2, "--json")
    record = measure(*words).record
    assert record["spread"] == 0
    pruned = next(row for row in record["rows"] if row["kind"] == "pruned")
    first, second = pruned["mutual_information"]
    assert first > 0 and second == pytest.approx(first, rel=0.5)
    one, other = pruned["tokens_per_layer"]
    assert one == AutoPrune(40).plan(LAYERS, VISUAL, first)
    assert other == AutoPrune(40).plan(LAYERS, VISUAL, second)
    record = measure("--spread", 2, *words).record
    assert record["spread"] == 2
    pruned = next(row for row in record["rows"] if row["kind"] == "pruned")
    assert pruned["tokens_per_layer"][1] == AutoPrune(40).plan(LAYERS, VISUAL, 2.0)


def test_a_checkpoint_is_asked_ones_own_question_about_ones_own_picture(measure, tmp_path):
    path = tmp_path / "wide.png"
    Image.new("RGB", (96, 48), "red").save(path)
    words = ("--method", "autoprune", "--budget", 40, "--batch", 2, "--json")
    usual = measure(*words).record
    own = measure(*words, "--image", path, "--question", "how many crosses are there?").record
    usual, row = (
        next(r for r in record["rows"] if r["kind"] == "pruned") for record in (usual, own)
    )
    assert row["text_tokens"] != usual["text_tokens"]
    first, second = row["mutual_information"]
    assert first == pytest.approx(second) and first != usual["mutual_information"][0]
    assert "--question 'how many crosses are there?'" in own["command"]
    assert f"--image {path}" in own["command"]


def test_it_is_said_where_nothing_is_pruned(measure):
    out = measure("--method", "random", "--budget", f"40,{VISUAL}").out
    assert out.count("nothing is pruned") == 1
    assert f"prompts have {VISUAL} visual tokens" in out


def test_an_earlier_file_is_kept_until_there_are_figures(measure, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text("mine")
    words = ("--method", "autoprune", "--output", tmp_path)
    assert measure(*words, "--budget", "40,1").code == 2
    assert path.read_text() == "mine"
    assert measure(*words, "--budget", "40").code == 0
    assert json.loads(path.read_text())["rows"]


def test_an_output_that_is_a_file(measure, tmp_path):
    path = tmp_path / "bench"
    path.write_text("mine")
    outcome = measure("--budget", 40, "--output", path)
    assert outcome.code == 2 and "is a file" in outcome.err
    assert path.read_text() == "mine"
