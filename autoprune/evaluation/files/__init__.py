"""Files of questions in, files of answers out, as LLaVA's evaluation scripts have them.

from autoprune.evaluation.files import Asking, answer_file

asking = Asking(Path("questions.jsonl"), Path("images"), AutoPrune(budget=64), model="llava-hf/llava-1.5-7b-hf")
outcome = answer_file(asking, Path("answers.jsonl"))
"""

from .asking import Asking
from .run import Engine, Outcome, answer_file

__all__ = ["Asking", "Engine", "Outcome", "answer_file"]
