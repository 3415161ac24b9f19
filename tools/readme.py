"""Write the table of families into the README: `make readme`."""

from __future__ import annotations

import sys
from pathlib import Path

from autoprune import families

START = "<!-- families: written by `make readme` -->"
END = "<!-- end of families -->"


def with_table(text: str) -> str:
    """`text` with the present table between the two markers.

    Raises:
        ValueError: the markers are not there, each once and in this order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in rest or END in before + after:
        raise ValueError(f"expected one line {START!r} and, behind it, one line {END!r}")
    return f"{before}{START}\n\n{families.markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
