"""`autoprune methods` lists what `create` can build."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import autoprune
from autoprune.commands.inputs import build_method, parse_budget
from autoprune.commands.methods import documentation, options


def test_every_method_is_listed_with_its_paper(call):
    records = call("methods", "--json").record
    assert [record["name"] for record in records] == autoprune.list_methods()
    assert all(record["summary"].endswith(".") and record["paper"] for record in records)


def test_listed_options_are_what_create_takes(call):
    for record in call("methods", "--json").record:
        options = {key: value for key, value in record["options"].items() if value is not None}
        assert autoprune.create(record["name"], budget=64, **options).name == record["name"]


def test_the_table_names_every_method(call):
    out = call("methods").out
    assert all(name in out for name in autoprune.list_methods())


def test_one_method_is_explained_with_its_options(call):
    out = call("methods", "autoprune").out
    assert "mutual information" in out
    assert "--set k0=0.4" in out
    assert call("methods", "autoprune", "--json").record["options"]["gamma"] == 0.3


def test_every_option_is_explained_also_those_that_all_methods_share():
    for name in autoprune.list_methods():
        text = documentation(name)
        for option in options(name):
            assert re.search(rf"^    (\w+, )*{option}(, \w+)*: ", text, re.M), (name, option)


def test_settings_as_released_are_told(call):
    out = " ".join(call("methods", "fastervlm").out.split())
    assert "As released: --set positions=compacted --set mask_padding=False" in out
    assert "As released" not in call("methods", "random").out
    record = call("methods", "visionzip", "--json").record
    assert record["released"]["order"] == "released"


def test_names_keep_their_backticks(call):
    assert "One cut before layer `layer` (K)" in call("methods", "fastv").out


def test_an_unknown_method_is_an_error(call):
    outcome = call("methods", "magic")
    assert outcome.code == 2
    assert "there is no method 'magic'" in outcome.err


def test_help_needs_no_model(call):
    outcome = call("--help")
    assert outcome.code == 0
    assert all(command in outcome.out for command in ("demo", "run", "plan", "compare", "bench"))


def test_help_and_families_do_not_wait_for_torch():
    script = "import sys; from autoprune import cli; cli.main(sys.argv[1:])"
    for words in (["--help"], ["run", "--help"], ["--version"], ["families"]):
        code = (
            f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {script}"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "False", words


def test_an_option_of_several_numbers_is_one_word():
    budget = parse_budget("1/4")
    assert build_method("pdrop", budget, {}, ["layers=2 6 15"]).layers == (2, 6, 15)
    assert build_method("pdrop", budget, {}, ["layers=none"]).layers is None
    with pytest.raises(ValueError, match="expects numbers such as"):
        build_method("pdrop", budget, {}, ["layers=early"])


def test_a_name_that_is_spelt_alike_is_offered(call):
    assert "did you mean 'autoprune'?" in call("methods", "AutoPrun").err


def test_the_version_is_shown(call):
    outcome = call("--version")
    assert outcome.code == 0 and outcome.out.strip() == f"autoprune {autoprune.__version__}"
