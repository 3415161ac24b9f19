"""`python -m autoprune.llava_eval` in the place of `llava.eval.model_vqa_loader`, `_science` and `_mmbench`."""

import sys

from .cli import main

if __name__ == "__main__":
    main(["llava-eval", *sys.argv[1:]])
