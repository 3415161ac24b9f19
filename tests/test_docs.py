"""What the pages say can be typed: commands have the options they show, Python blocks and the notebook run."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import nbformat
import pytest
import transformers
import typer
from click.core import Context
from packaging.version import Version
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from autoprune import tiny
from autoprune.cli import app
from autoprune.engine.locate import locate
from tests import processors, zoo
from tests.test_readme_models import run_block

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app)
TOOL = runpy.run_path(str(ROOT / "tools" / "notebook.py"))
INDEX = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def commands_of(page: Path) -> list[str]:
    """Commands that stand on lines of their own, put together where a backslash breaks them."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^ {4,}(autoprune .+)$", text, re.MULTILINE)


def blocks_of(text: str) -> list[str]:
    """Python blocks, also those inside tabs."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_have_the_options_they_show(page):
    for line in commands_of(page):
        words = shlex.split(line, comments=True)[1:]
        # Brackets are around what may be left out.
        words = [word.strip("[]") for word in words]
        command = COMMANDS.get_command(Context(COMMANDS), words[0])
        assert command is not None, line
        known = {name for option in command.params for name in option.opts + option.secondary_opts}
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in {*known, "--help", "--debug"}, line


def test_commands_are_found_on_pages():
    assert sum(len(commands_of(page)) for page in PAGES) > 70


def test_the_first_block_of_the_start_page_runs(capsys):
    block = blocks_of(INDEX)[0]
    exec(compile(block, "index.md", "exec"), {})
    answer, layers = capsys.readouterr().out.splitlines()
    assert answer and sum(eval(layers)) == 16 * 16


@pytest.mark.parametrize(
    ("number", "name", "family"),
    [
        (1, "llava-hf/llava-1.5-7b-hf", "llava"),
        (2, "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl"),
        (3, "OpenGVLab/InternVL3-8B-hf", "internvl"),
    ],
)
def test_the_blocks_for_ones_own_model_run(number, name, family, tmp_path, monkeypatch, capsys):
    assert family in processors.TOKENS
    block = blocks_of(INDEX)[number]
    # 64 tokens are more than the tiny stand-in has.
    names = run_block(block.replace("budget=64", "budget=6"), name, family, tmp_path, monkeypatch)
    (sample,) = names["trace"].samples
    budget = 6 if family == "llava" else sample.num_visual / 4
    assert sum(sample.tokens_per_layer) == round(zoo.LAYERS * budget)
    answer, summary = capsys.readouterr().out.splitlines()
    assert answer and summary.startswith("1 prompt (1 with images): ")


def test_blocks_of_families_run(capsys):
    """The second one is a formula inside its sentence."""
    block, _ = blocks_of((ROOT / "docs" / "families.md").read_text(encoding="utf-8"))
    exec(compile(block, "families.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "found"


def test_the_block_of_explain_draws_two_pictures(tmp_path, monkeypatch):
    (block,) = blocks_of((ROOT / "docs" / "explain.md").read_text(encoding="utf-8"))
    model, processor = tiny.load()
    first, second = (tiny.draw_scene(seed).image for seed in (3, 4))
    text = tiny.prompt(processor, "what color is the ring?").replace("<image>", "<image> <image>")
    inputs = processor(images=[[first, second]], text=[text], return_tensors="pt")
    monkeypatch.chdir(tmp_path)
    exec(block, {"model": model, "inputs": inputs, "first": first, "second": second})
    for name in ("kept.png", "attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_block_of_models_loads_a_thinker(tmp_path):
    block, _ = blocks_of((ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
    zoo.build("qwen2_5_omni_thinker").save_pretrained(tmp_path)
    names: dict = {}
    exec(block.replace('"Qwen/Qwen2.5-Omni-7B"', repr(str(tmp_path))), names)
    assert locate(names["model"]).present_cost() is not None


def test_the_block_of_models_mends_llama_4(monkeypatch):
    """Where transformers has the fault; elsewhere the lines change nothing."""
    _, block = blocks_of((ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
    model = zoo.build("llama4")
    arguments = zoo.inputs("llama4", model)
    monkeypatch.delattr(MoeCausalLMOutputWithPast, "image_outputs", raising=False)
    if Version(transformers.__version__) == Version("5.24"):
        with pytest.raises(AttributeError, match="image_outputs"):
            model(**arguments)
    exec(block, {})
    assert model(**arguments).logits.isfinite().all()


def test_every_block_is_run_somewhere():
    """That of serving.md by tests/serving, what vllm.md shows by vllm/tests, the README's by test_examples."""
    known = {
        "README.md",
        "index.md",
        "families.md",
        "explain.md",
        "models.md",
        "serving.md",
        "vllm.md",
    }
    assert {page.name for page in PAGES if blocks_of(page.read_text(encoding="utf-8"))} == known


def test_the_notebook_runs():
    path = ROOT / "examples" / "tour.ipynb"
    notebook = nbformat.read(path, as_version=4)
    committed = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    notebook = TOOL["run"](path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) == 10
    for cell, before in zip(cells[1:], committed[1:], strict=True):
        assert cell.outputs and before, "run `make notebook`"
        assert printed(cell.outputs) == printed(before), "run `make notebook`"


def printed(outputs) -> str:
    """What a cell prints may come in several pieces."""
    return "".join(output.text for output in outputs if output.get("name") == "stdout")
