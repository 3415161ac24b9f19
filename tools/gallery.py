"""The pictures of docs/gallery.md, drawn by `autoprune.viz` from prompts that are run here.

python tools/gallery.py docs/images/gallery
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from autoprune import AutoPrune, create, tiny, viz
from autoprune.commands.explanation import ExplainRequest, figures, measure

SEED = 1518
EASY, HARD = "what does the sign say?", "how many crosses are there?"
METHODS = ("autoprune", "fastv", "sparsevlm", "divprune", "scope", "random")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "scene.png"
    tiny.draw_scene(SEED).image.save(picture)
    for name, question, method in (
        ("easy", EASY, AutoPrune(24)),
        ("hard", HARD, AutoPrune(24)),
        ("summary", HARD, AutoPrune(24, merger="summary")),
    ):
        found = measure(ExplainRequest(picture, question, method, layers=(1, 8, 15)))
        for dark in (False, True):
            for figure, drawn in figures(found, dark).items():
                wanted = (figure == "summary") == (name == "summary") and figure != "tokens"
                if wanted:
                    _write(folder, figure if name == figure else f"{name}_{figure}", drawn, dark)
    rows = []
    for name in METHODS:
        found = measure(ExplainRequest(picture, HARD, create(name, budget=24), layers=(1, 8, 15)))
        title = f"{name}: {found.pruned.text}"
        rows.append(viz.kept_patches(found.views[0].image, found.sample, title=title, size=190))
    _write(folder, "methods", viz.tile(rows, columns=2), dark=False)


def _write(folder: Path, name: str, drawn, dark: bool) -> None:
    """256 colours do, and halve the file."""
    image = Image.open(io.BytesIO(viz.to_png(drawn))).convert("RGB")
    path = folder / f"{name}{'_dark' if dark else ''}.png"
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
