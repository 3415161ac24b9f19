"""`autoprune tune` for the second benchmark model: which settings are right for it, found without labels.

    python tune.py --budget 1/9 --prompts 270 --trials 50 --folder RUN

Prompts are held-out questions of seeds that `compare.py` does not use. Half of them are tuned on, the
other half judges. RUN keeps the study, so a run can be stopped at any time and the same call goes on. What
is found goes to --output as JSON, as `autoprune tune` writes it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from compare import tasks_of
from model import load
from questions import EASY, HARD

from autoprune.commands.inputs import parse_budget
from autoprune.tuning import Options, tune
from autoprune.tuning.result import figures

RESULTS = Path(__file__).parents[1] / "results" / "second_model_tuned.json"
SEED = 1000
"""Seeds from here on are for tuning."""


def main() -> None:
    """Tune, write the settings and say what they are worth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="1/9")
    parser.add_argument("--prompts", type=int, default=270, help="half of them to judge on")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=34)
    parser.add_argument("--decoder", type=Path, help="GGUF file or a folder of save_pretrained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, required=True, help="the study, to go on from")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, processor = load(decoder=options.decoder)
    model.to(options.device)
    drawn = tasks_of(-(-options.prompts // len(EASY + HARD)), seed=SEED)[: options.prompts]
    prompts = [replace(task, kind="all", answers=()) for task in drawn]
    asked = Options(
        trials=options.trials,
        new_tokens=8,
        batch_size=options.batch_size,
        model_name="second_model",
        timing=False,
        command="python tune.py " + shlex.join(sys.argv[1:]),
        show_progress=True,
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    result = tune(model, processor, prompts, parse_budget(options.budget), options.folder, asked)
    result.file.write(options.output)
    print(result.verdict)
    for own in result.judged:
        print(own.label, own.method, figures(own))


if __name__ == "__main__":
    main()
