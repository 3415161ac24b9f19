"""`python -m autoprune.models.cogvlm CHECKPOINT OUTPUT`: the published CogVLM for transformers 5."""

from __future__ import annotations

import argparse

from .convert import TOKENIZER, convert
from .processing import TEMPLATES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m autoprune.models.cogvlm",
        description="Write the published checkpoint of CogVLM-17B so that transformers 5 loads it.",
    )
    parser.add_argument("checkpoint", help="folder of the published checkpoint")
    parser.add_argument("output", help="a new folder, as large as the checkpoint")
    parser.add_argument(
        "--tokenizer", default=TOKENIZER, help="folder or hub name (default: %(default)s)"
    )
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        help="how questions are put; by default as the checkpoint says",
    )
    given = parser.parse_args()
    try:
        convert(given.checkpoint, given.output, given.tokenizer, given.template)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
