"""Scores of files of answers, by the formulas of the data sets' own evaluations.

from autoprune.evaluation.scorers import Sources, score

found = score("gqa", Path("answers.jsonl"), Sources(Path("testdev_balanced_questions.json")))
"""

from .figures import Figure
from .scoring import FORMATS, Scored, score
from .sources import Sources

__all__ = ["FORMATS", "Figure", "Scored", "Sources", "score"]
