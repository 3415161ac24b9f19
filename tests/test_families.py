"""The table of families says what the tests and the engine say."""

from __future__ import annotations

import functools
import importlib
import runpy
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autoprune import families
from autoprune.commands.families import describe
from autoprune.contract import Tower
from autoprune.engine.locate import locate
from autoprune.engine.vision import maps as vision_maps
from autoprune.engine.vision.tower import TowerParts
from autoprune.loading import is_hub_name
from autoprune.models import register
from tests import zoo
from tests.engine import test_backends

ROOT = Path(__file__).parents[1]
# Further configurations of a family that the tests try.
VARIANTS = {"llava_sliding": "llava"}
EMULATED = {"flash": test_backends.FLASH, "flex": test_backends.FLEX}
NAMES = [family.name for family in families.FAMILIES]


register()


def is_missing(family: families.Family) -> bool:
    """Whether the installed transformers does not have it."""
    return family.model_type not in CONFIG_MAPPING


ROWS = pytest.mark.parametrize(
    "family",
    [row for row in families.FAMILIES if not is_missing(row)],
    ids=lambda family: family.name,
)
TOOL = runpy.run_path(str(ROOT / "tools" / "readme.py"))
model_of = functools.cache(zoo.build)


def test_the_rows_are_the_families_of_the_zoo():
    tried = {family.name for family in families.FAMILIES if not is_missing(family)}
    assert tried == zoo.FAMILIES.keys() - VARIANTS | zoo.CORE.keys()
    assert {
        row.name for row in families.FAMILIES if row.core and not is_missing(row)
    } == zoo.CORE.keys()
    assert set(VARIANTS.values()) <= set(NAMES)


@ROWS
def test_a_row_says_what_the_zoo_tries(family):
    tried = zoo.family_of(family.name)
    assert family.media == tried.media
    assert tuple(b for b in family.backends if b not in EMULATED) == tried.attentions
    for backend, names in EMULATED.items():
        assert (backend in family.backends) == (family.name in names)
    assert family.model_type == tried.config().model_type
    assert family.every_mode == (family.name in zoo.EVERY_MODE)


def test_every_row_names_a_checkpoint_of_its_own_and_the_readme_shows_it():
    names = [family.checkpoint for family in families.FAMILIES]
    assert len(set(names)) == len(names)
    assert all(is_hub_name(name) for name in names)
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    for family in families.FAMILIES:
        assert f"| {family.title} | {family.model_type} | {family.checkpoint} |" in table


@ROWS
def test_a_row_says_how_the_engine_scores_patches(family):
    known = vision_maps.PATCH_LAYOUTS.get(family.model_type)
    assert (known is not None) == (family.vision is not None)
    assert (getattr(known, "video", None) is not None) == (family.video and known is not None)
    located = locate(model_of(family.name, family.backends[0]))
    parts = TowerParts.of(located.base, located.vision, Tower(attention=True))
    assert (parts.attention is not None) == (family.vision is not None)
    if parts.attention is not None:
        assert parts.has_cls == (family.vision == "cls")


@ROWS
def test_a_row_tells_of_sliding_layers(family):
    attention = zoo.family_of(family.name).attentions[0]
    sliding = any(locate(zoo.build(family.name, attention)).windows)
    assert (families.SLIDING in family.note) == sliding


def test_the_engine_scores_no_family_without_a_row():
    assert vision_maps.PATCH_LAYOUTS.keys() <= families.MODEL_TYPES


@pytest.mark.parametrize("check", families.CHECKS, ids=lambda check: check.name)
def test_the_checks_exist(check):
    file, _, function = TOOL["TESTS"][check.name].partition("::")
    assert (ROOT / file).exists()
    if function:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert callable(getattr(module, function))


def test_every_family_is_checked_against_the_oracle():
    for record in map(describe, families.FAMILIES):
        assert {"oracle", "nothing pruned", "budget", "batches"} <= record["checks"].keys()
        assert ("vision scores" in record["checks"]) == (record["vision_scores"] != "none")


def test_the_readme_shows_this_table(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert TOOL["with_table"](readme) == readme, "run `make readme`"
    copy = tmp_path / "README.md"
    copy.write_text(readme.replace("LLaVA-NeXT-Video", "outdated"), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["readme.py", str(copy)])
    runpy.run_path(str(ROOT / "tools" / "readme.py"), run_name="__main__")
    assert copy.read_text(encoding="utf-8") == readme


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="expected one line"):
        TOOL["with_table"]("# autoprune\n")
