"""`python -m autoprune.models.senna CHECKPOINT OUTPUT`: convert a checkpoint of Senna's own code."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m autoprune.models.senna", description=__doc__)
    parser.add_argument("checkpoint", help="folder of a checkpoint in the format of Senna's code")
    parser.add_argument("output", help="folder to write")
    given = parser.parse_args()
    from .convert import convert

    try:
        convert(given.checkpoint, given.output)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"wrote {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
