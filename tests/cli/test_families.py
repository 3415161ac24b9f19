"""`autoprune families` lists what is supported and the checks behind it."""

from __future__ import annotations

from autoprune import families


def test_every_family_is_listed_with_the_tests_behind_it(call):
    records = call("families", "--json").record
    assert [record["name"] for record in records] == [row.name for row in families.FAMILIES]
    for record in records:
        assert record["checks"]["oracle"].startswith("tests/engine/test_oracle_equality.py::")
    by_name = {record["name"]: record for record in records}
    assert by_name["qwen2_5_vl"]["media"] == ["image", "video"]
    assert by_name["llava"]["vision_scores"] == "CLS attention"
    assert by_name["paligemma2"]["model_type"] == "paligemma"
    assert "generation" in by_name["llava"]["checks"]
    assert "generation" not in by_name["gemma3"]["checks"]


def test_the_table_names_every_family_and_check(call):
    out = " ".join(call("families").out.split())
    assert all(row.model_type in out for row in families.FAMILIES)
    assert all(check.name in out for check in families.CHECKS)


def test_markdown_is_what_the_readme_shows(call):
    assert call("families", "--markdown").out == families.markdown() + "\n"


def test_two_formats_at_once_are_an_error(call):
    outcome = call("families", "--markdown", "--json")
    assert outcome.code == 2
    assert "choose one" in outcome.err
