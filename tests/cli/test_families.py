"""`autoprune families` lists what is supported and the checks behind it."""

from __future__ import annotations

from autoprune import families
from autoprune.commands.families import markdown


def test_every_family_is_listed_with_what_is_checked_of_it(call):
    records = call("families", "--json").record
    assert [record["name"] for record in records] == [row.name for row in families.FAMILIES]
    for record in records:
        assert "equal a slow model" in record["checks"]["oracle"]
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


def test_markdown_holds_the_rows_and_the_checks(call):
    lines = call("families", "--markdown").out.splitlines()
    assert "\n".join(lines) == markdown()
    assert lines[2].startswith("| LLaVA | llava | llava-hf/llava-1.5-7b-hf | images |")
    (flex,) = (line for line in lines if line.startswith("* flex: "))
    assert flex.endswith("(LLaVA, Qwen2.5-VL)")


def test_two_formats_at_once_are_an_error(call):
    outcome = call("families", "--markdown", "--json")
    assert outcome.code == 2
    assert "choose one" in outcome.err
