"""Run a notebook and keep what its cells print and draw, without warnings of the machine it ran on.

python tools/notebook.py examples/tour.ipynb
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbclient
import nbformat


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": path.parent}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    nbformat.write(run(Path(sys.argv[1])), sys.argv[1])
