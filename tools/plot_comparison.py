"""Draw the plots of finished comparisons anew: python tools/plot_comparison.py FOLDER ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from autoprune.evaluation.plot import plot
from autoprune.files import write_whole
from autoprune.viz import to_png


def main(folders: list[str]) -> None:
    for folder in map(Path, folders):
        record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        picture = to_png(plot(record["rows"], record["baseline"]))
        write_whole(folder / "accuracy_vs_flops.png", picture)


if __name__ == "__main__":
    main(sys.argv[1:])
