"""`autoprune explain` writes the pictures of one prompt, and a page that says what ran says."""

from __future__ import annotations

import html
import shlex

import numpy as np
import pytest
from PIL import Image

from autoprune import create
from autoprune.commands.explanation import ExplainRequest, figures, measure
from autoprune.models.senna.convert import convert
from autoprune.tiny import draw_scene
from tests.cli.conftest import LAYERS, VISUAL
from tests.models import senna_checkpoint
from tests.pages import Page

QUESTION = "is there a <script>alert(1)</script> ring?"


@pytest.fixture
def explain(call, picture, model_folder, tmp_path):
    def run(*words, question=QUESTION):
        fixed = ("--model", model_folder, "--max-new-tokens", 2, "--output", tmp_path / "out")
        budget = () if "--budget" in words else ("--budget", 30)
        return call("explain", picture, question, *fixed, *budget, *words)

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Spares the drawing of figures that a test does not look at."""
    for module in ("explain", "explain_page"):
        monkeypatch.setattr(f"autoprune.commands.{module}.to_png", lambda picture: b"\x89PNG")


def test_the_pictures_are_written_and_listed(explain, tmp_path):
    record = explain("--set", "merger=summary", "--json").record
    names = ["kept.png", "summary.png", "attention.png", "retention.png", "tokens.png", "kept.webp"]
    assert record["files"] == [str(tmp_path / "out" / name) for name in names]
    for path in record["files"]:
        with Image.open(path) as image:
            image.load()
    assert np.shape(record["attention"]) == (LAYERS, VISUAL)
    assert record["answer_unpruned"] is not None


def test_the_page_holds_all_that_was_measured_and_nothing_of_elsewhere(explain, tmp_path):
    path = tmp_path / "page.html"
    record = explain("--report", path, "--json").record
    content = path.read_text("utf-8")
    seen = Page(content)
    assert seen.loaded and all(source.startswith("data:image/") for source in seen.loaded)
    assert "http" not in seen.text and "://" not in content.split("base64")[0]
    assert seen.tags.count("script") == 1 and QUESTION in seen.text
    answers, costs, settings = seen.tables
    assert answers[1:] == [
        ["pruned", record["answer"]],
        ["all visual tokens", record["answer_unpruned"]],
    ]
    shown = {row[0]: row[1:] for row in costs}
    assert shown["visual tokens, mean per layer"] == ["30", "144", "79.2%"]
    assert shown["mutual information"][0] == f"{record['mutual_information']:.3f} bits"
    assert shown["KV cache"][0] == f"{record['kv_bytes'] / 1e6:.4g} MB"
    per_layer = dict(map(tuple, settings))["tokens entering each layer"]
    assert per_layer == ", ".join(map(str, record["tokens_per_layer"]))


def test_the_command_on_the_page_repeats_it(explain, call, tmp_path, undrawn):
    path, question = tmp_path / "page.html", "-1? it's a ring?"
    first = explain(
        "--report", path, "--set", "k0=0.8", "--layers", "0,3", "--json", question=question
    ).record
    content = path.read_text("utf-8")
    start = content.index("<pre><code>") + len("<pre><code>")
    words = shlex.split(html.unescape(content[start : content.index("</code>", start)]))
    assert words[:2] == ["autoprune", "explain"]
    separator = words.index("--")
    again = call(*words[1:separator], "--json", *words[separator:]).record
    assert again["kept"] == first["kept"] and again["question"] == question


def test_the_strip_is_of_the_trace_and_the_curve_between_its_ends(picture, model_folder):
    method = create("autoprune", budget=30)
    request = ExplainRequest(
        picture, "a ring?", method, str(model_folder), max_new_tokens=1, layers=range(LAYERS),
        reference=(0.25, 0.75),
    )  # fmt: skip
    found = measure(request)
    drawn = figures(found)
    full, *panels = (np.asarray(axes.images[0].get_array()) for axes in drawn["kept"].axes)
    whole = np.asarray(
        Image.fromarray(full).resize((320, 320), Image.Resampling.BICUBIC), dtype=int
    )
    for kept, panel in zip(found.sample.kept, panels, strict=True):
        at = [
            (int((r + 0.5) * 320 / 12), int((c + 0.5) * 320 / 12))
            for r in range(12)
            for c in range(12)
        ]
        same = {token for token, place in enumerate(at) if (panel[place] == whole[place]).all()}
        assert same == set(kept.tolist())
    curves = {line.get_label(): list(line.get_ydata()) for line in drawn["retention"].axes[0].lines}
    assert curves["least given: 0.250 bits"] == method.plan(LAYERS, VISUAL, 0.25)
    assert curves["most given: 0.750 bits"] == method.plan(LAYERS, VISUAL, 0.75)
    (this,) = (values for label, values in curves.items() if label.startswith("this prompt"))
    assert this == found.sample.tokens_per_layer


def test_a_method_without_information_has_no_curve(explain, undrawn):
    record = explain("--method", "random", "--json").record
    assert "retention.png" not in " ".join(record["files"])


def test_a_family_whose_grid_is_not_known_gets_a_sentence(explain, monkeypatch, tmp_path, undrawn):
    def unknown(*_):
        raise ValueError("no grid")

    monkeypatch.setattr("autoprune.commands.explanation.views", unknown)
    outcome = explain("--report", tmp_path / "page.html")
    assert outcome.code == 0
    for text in (outcome.out, Page((tmp_path / "page.html").read_text()).text):
        assert "the visual tokens of llava lie in the picture is not known" in " ".join(
            text.split()
        )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "attention.png", "retention.png", "tokens.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "1,x"), "--layers takes whole numbers by commas, such as 1,6,11, got '1,x'"),
        (("--layers", "6"), "layers must be between 0 and 5, got [6]"),
        (("--reference", "0.9,0.1"), "--reference takes the least and the most information"),
        (("--reference", "1"), "got '1'"),
        (("--report", "no/such/folder.html"), "there is no folder 'no/such'"),
    ],
)
def test_bad_options_are_one_sentence(explain, words, message):
    outcome = explain(*words)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1


def test_several_pictures_are_drawn_each_with_its_patches(call, picture, model_folder, tmp_path):
    other = tmp_path / "other.png"
    draw_scene(4).image.save(other)
    fixed = ("--model", model_folder, "--max-new-tokens", 2, "--output", tmp_path / "out")
    page = tmp_path / "page.html"
    words = (picture, other, QUESTION, *fixed, "--budget", 100, "--set", "per_picture=equal")
    record = call("explain", *words, "--report", page, "--json").record
    assert record["images"] == [str(picture), str(other)]
    assert record["num_visual"] == 2 * VISUAL and record["pictures"] == [VISUAL, VISUAL]
    with Image.open(tmp_path / "out" / "kept.png") as drawn:
        assert drawn.height > drawn.width / 3  # two rows of four panels
    for kept in record["kept"][1:]:
        first = sum(token < VISUAL for token in kept)
        assert abs(2 * first - len(kept)) <= 1
    assert f"{picture} {other} " in html.unescape(page.read_text("utf-8"))


def test_six_views_of_senna_are_drawn_with_counts(call, tmp_path):
    senna_checkpoint.write_checkpoint(tmp_path / "upstream")
    convert(tmp_path / "upstream", tmp_path / "model")
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path, view in zip(paths, senna_checkpoint.views(), strict=True):
        view.save(path)
    fixed = ("--model", tmp_path / "model", "--budget", 12, "--output", tmp_path / "out")
    words = (*paths, "plan?", *fixed, "--max-new-tokens", 2)
    record = call("explain", *words, "--report", tmp_path / "page.html", "--json").record
    assert record["files"][0].endswith("views.png")
    assert record["pictures"] == [senna_checkpoint.VIEW_TOKENS] * 6
    content = " ".join(Page((tmp_path / "page.html").read_text("utf-8")).text.split())
    assert "A token of this model is no patch, so counts are drawn" in content
