"""Write what the documentation repeats from the code: `make readme`.

The table of families goes into the README, the page of methods to docs/methods.md.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import textwrap
from pathlib import Path

from autoprune.commands.families import markdown
from autoprune.commands.methods import documentation
from autoprune.methods import METHODS, options_of

START = "<!-- families: written by `make readme` -->"
END = "<!-- end of families -->"

_EQUALITY = "tests/engine/test_oracle_equality.py"
TESTS = {
    "oracle": f"{_EQUALITY}::test_pruning_equals_the_oracle",
    "nothing pruned": (f"{_EQUALITY}::test_a_budget_of_everything_is_the_plain_model_bit_for_bit"),
    "budget": f"{_EQUALITY}::test_the_trace_says_what_the_prompts_hold_and_spends_the_budget",
    "batches": f"{_EQUALITY}::test_a_prompt_gets_in_a_batch_what_it_gets_alone",
    "padding": f"{_EQUALITY}::test_a_plain_forward_returns_the_oracles_rows_in_their_places",
    "text attention": "tests/engine/test_observations.py::test_attention_is_the_models_own",
    "vision scores": (
        "tests/engine/test_vision_scores.py::test_a_patch_scores_exactly_the_tokens_it_makes"
    ),
    "generation": "tests/engine/test_generation.py",
    "flash": "tests/engine/test_backends.py::test_flash_attention_equals_the_oracle",
    "flex": "tests/engine/test_backends.py::test_flex_attention_equals_the_oracle",
}
"""The test behind each check of `autoprune.families`: a file, or file::function."""

METHODS_HEAD = """# Methods

<!-- written by `make readme` from the methods' docstrings -->

Every method spends the budget that it is given: the mean number of visual tokens that *enter* a decoder layer,
which is what FLOPs and the KV cache see ([budget.md](budget.md)). `AutoPrune` spends it exactly; a method
whose schedule has a fixed shape takes the nearest from below, and the trace says what was spent. What a method
cannot spend at all (a cut after layer 2 has to pay for two full layers) is refused with the smallest budget
that works.

Layers are stated for 32 layers and rescaled to the model's depth. `autoprune.create(name, budget=...)` builds
a method, `autoprune compare` puts them side by side ([compare.md](compare.md)), [adaptivity.md](adaptivity.md)
says how they fare on the embedded model. Each was written from its paper, and each says how it differs from
its authors' code, and with which of its options it comes closest to it (*as released*; `autoprune compare
--methods all,released` has those rows, too). [CONTRIBUTING.md](../CONTRIBUTING.md) shows how to add one.

## As released

What can be set to the authors' way has a setting, and the section of the method names it under *As released*.
Positions, order and padding have the default that does better on the embedded model. Figures below are its
accuracy on 450 questions, 50 of each kind (`autoprune compare --methods all,released --questions 50 --budgets
1/4,1/9`); a difference of two rows has a standard error of 1 to 2 points.

**Positions.** Methods that cut before the decoder hand it a shorter sequence, numbered 0, 1, 2, ...;
PyramidDrop and SparseVLM number the tokens that are left anew after each cut. Here tokens keep their
positions, unless `positions="compacted"` is set, which families with positions of several dimensions
(Qwen2-VL and later) refuse. Numbering anew is worse for all of them but HiPrune, where it makes no
difference, mostly in questions about where things are:

| method | 1/4: kept | 1/4: anew | 1/9: kept | 1/9: anew |
|---|--:|--:|--:|--:|
| fastervlm | 0.787 | 0.733 | 0.467 | 0.431 |
| vispruner | 0.864 | 0.833 | 0.740 | 0.671 |
| visionzip | 0.824 | 0.778 | 0.562 | 0.524 |
| prumerge | 0.869 | 0.838 | 0.496 | 0.458 |
| hiprune | 0.564 | 0.558 | 0.460 | 0.462 |
| divprune | 0.902 | 0.869 | 0.773 | 0.700 |
| cdpruner | 0.771 | 0.758 | 0.642 | 0.627 |
| scope | 0.884 | 0.847 | 0.740 | 0.696 |
| tome | 0.911 | 0.891 | 0.758 | 0.742 |
| turbo | 0.880 | 0.853 | 0.778 | 0.736 |
| folder | 0.747 | 0.727 | 0.633 | 0.624 |
| pdrop | 0.918 | 0.904 | 0.780 | 0.756 |
| sparsevlm | 0.962 | 0.922 | 0.907 | 0.873 |

**Order.** With `order="released"` VisionZip and PruMerge+ hand over tokens in their authors' order: on top of
compacted positions +0.002 and 0.000 for VisionZip, -0.013 and -0.007 for PruMerge+, at 1/4 and 1/9.

**Padding.** Where pictures are padded to a square, patches of padding come last; with `mask_padding=False`,
as in the authors' code, they are as good as any other. Of pictures of 3 : 2, where 48 of 144 tokens are
padding, 36 are kept: of them 0.2 (FasterVLM), 1.7 (SCOPE), 3 to 6 (VisionZip, PruMerge+, VisPruner, Turbo,
ToMe), 12 (FOLDER) and 14 (HiPrune) are padding then. On 225 such questions accuracy changes by -0.124 for
FOLDER, and by no more than about its error (-0.013 to +0.013) for the others; HiPrune was not asked.

**Weight of attention.** Turbo's 0.26 of the code for BLIP does better here than its 0.87 of the code for
LLaVA: 0.904 against 0.880 at 1/4, 0.809 against 0.778 at 1/9. FOLDER's weight has no effect at these budgets,
where every second token goes until a half or less is left; of 576 tokens folded into 384 it spares the most
attended ones.

**HiPrune's registers** are ranked by what a patch receives from all others, as in the authors' code. By the
CLS token's attention alone, as FasterVLM ranks, accuracy here was 0.796 at 1/4 and 0.467 at 1/9.

**SparseVLM's second version** (`version=2`, positions kept) reaches 0.949 at 1/4 and 0.842 at 1/9, the first
one 0.962 and 0.907.
"""


def with_table(text: str) -> str:
    """`text` with the present table between the two markers.

    Raises:
        ValueError: the markers are not there, each once and in this order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in rest or END in before + after:
        raise ValueError(f"expected one line {START!r} and, behind it, one line {END!r}")
    files = {check: test.partition("::")[0] for check, test in TESTS.items()}
    return f"{before}{START}\n\n{markdown(files)}\n\n{END}{after}"


def methods_page() -> str:
    """docs/methods.md: a section for each method, from its docstring, paper and options."""
    sections = [METHODS_HEAD, _index()]
    for name, method in METHODS.items():
        text, _, arguments = documentation(name).partition("\n\nArgs:\n")
        options = [f"`{field.name}={field.default!r}`" for field in options_of(name).values()]
        sections += [
            f"## {name}\n",
            f"*{_linked(method.paper)}*\n",
            text + "\n",
            *([f"Options: {', '.join(options)}\n", _arguments(arguments)] if options else []),
        ]
        if method.released:
            released = (f"`{option}={value!r}`" for option, value in method.released.items())
            sections.append(f"As released: {', '.join(released)}\n")
    return "\n".join(sections).rstrip() + "\n"


def _index() -> str:
    lines = ["| method | |", "|---|---|"]
    for name, method in METHODS.items():
        summary = (inspect.getdoc(method) or "").partition("\n")[0]
        lines.append(f"| [{name}](#{name}) | {summary} |")
    return "\n".join([*lines, ""])


def _arguments(text: str) -> str:
    """The Args section, which is indented, as a list without the budget."""
    lines = itertools.takewhile(lambda line: line.startswith(" "), text.split("\n"))
    text = textwrap.dedent("\n".join(lines))
    entries = re.split(r"\n(?=\S)", text)
    items = [" ".join(entry.split()) for entry in entries if not entry.startswith("budget:")]
    named = (item.partition(": ") for item in items if item)
    return "\n".join([*(f"* `{name}`: {rest}" for name, _, rest in named), ""])


def _linked(paper: str) -> str:
    return re.sub(r"arxiv\.org/abs/([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
    page = readme.parent / "docs" / "methods.md"
    if page.parent.is_dir():
        page.write_text(methods_page(), encoding="utf-8")
