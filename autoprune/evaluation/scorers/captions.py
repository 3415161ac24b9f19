"""Captions: CIDEr, BLEU, ROUGE-L, METEOR and SPICE, by pycocoevalcap, the code of COCO's caption challenge."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..statistics import RESAMPLES, Floats, Resampled
from .figures import Figure, Score, figure
from .matching import Key, Question
from .reading import Answer, field, id_of, read_json
from .sources import Sources

ORDERS = 4
_PUNCTUATION = re.compile(r"[^\w\s']|_")
_MISSING = "captions need pycocoevalcap, which is not installed: pip install 'autoprune[eval]'"
Captions = Mapping[str, Sequence[str]]


def read(sources: Sources) -> list[Question]:
    """The pictures of a COCO-format file, such as captions_val2014.json, with their captions."""
    path = sources.annotations
    captions: dict[str, list[str]] = defaultdict(list)
    for index, record in enumerate(
        field(read_json(path, "annotations"), "annotations", list, path.name)
    ):
        where = f"{path.name}, annotation {index}"
        captions[id_of(record, where, "image_id")].append(field(record, "caption", str, where))
    return [Question((image,), tuple(texts)) for image, texts in captions.items()]


def keys(answer: Answer) -> list[Key]:
    """The picture's id; or the number that its file's name ends in, as COCO_val2014_000000391895.jpg."""
    number = re.search(r"(\d+)(?:\.\w+)?$", answer.id)
    return [(answer.id,), *([(str(int(number[1])),)] if number else [])]


def figures(questions: Sequence[Question], texts: Sequence[str | None]) -> Score:
    """The metrics of pycocoevalcap, on its scale, with what they were computed from.

    A missing caption counts as an empty one.

    Raises:
        ImportError: pycocoevalcap is missing.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ImportError(_MISSING)
    references, candidates, notes = tokenized(
        {str(i): list(question.truth) for i, question in enumerate(questions)},
        {str(i): [text or ""] for i, text in enumerate(texts)},
    )
    found = _cider_and_rouge(references, candidates) + _bleu(references, candidates)
    java = shutil.which("java") is not None
    for name, lacking in (("METEOR", _meteor_lacks(java)), ("SPICE", _spice_lacks(java))):
        if lacking:
            notes.append(f"no {name}: {lacking}")
        else:
            value = _with_java(name, references, candidates)
            found.append(Figure(name, value, None, None, len(questions), ""))
    notes.append(
        "the intervals of CIDEr are over pictures, with the weights of words as they are; METEOR and SPICE "
        "have none"
    )
    return found, notes


def tokenized(references: Captions, candidates: Captions) -> tuple[Any, Any, list[str]]:
    """Both as words between spaces, and a note on how where it is not the official way."""
    if shutil.which("java") is None:
        note = (
            "tokens are lower-case words without punctuation, as the tokenizer of published figures needs "
            "Java, which is not installed: compare these figures with each other only"
        )
        return _words(references), _words(candidates), [note]
    return _ptb_tokens(references), _ptb_tokens(candidates), []


def _ptb_tokens(captions: Captions) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer gives a line for each caption, so none may hold an end of a line of any kind.
    lines = {
        image: [{"caption": " ".join(text.split())} for text in texts]
        for image, texts in captions.items()
    }
    with _quietly():
        tokens: dict[str, list[str]] = PTBTokenizer().tokenize(lines)
    if {image: len(texts) for image, texts in tokens.items()} != {
        image: len(texts) for image, texts in captions.items()
    }:
        raise ValueError(
            "Java did not run pycocoevalcap's tokenizer to its end; check `java -version`, or take Java off "
            "the PATH to go without it"
        )
    return tokens


def _words(captions: Captions) -> dict[str, list[str]]:
    return {
        image: [" ".join(_PUNCTUATION.sub(" ", text.lower()).split()) for text in texts]
        for image, texts in captions.items()
    }


def _cider_and_rouge(references: Any, candidates: Any) -> list[Figure]:
    """Means over the pictures."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scores = [scorer.compute_score(references, candidates)[1] for scorer in (Cider(), Rouge())]
    values = np.stack(scores).astype(float)
    count = values.shape[1]
    drawn = np.concatenate([draw @ values.T for draw in _draws(count)]) / count
    means = Resampled(values.mean(axis=1), drawn, count)
    return [
        figure(name, means.estimate(index), count, "")
        for index, name in enumerate(("CIDEr", "ROUGE-L"))
    ]


def _bleu(references: Any, candidates: Any) -> list[Figure]:
    """Of the whole corpus: matches and lengths are summed before they are divided."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=ORDERS)
    for image, (text,) in candidates.items():
        scorer += (text, references[image])
    count = len(candidates)
    parts = np.array([_bleu_parts(one) for one in scorer.ctest], float)
    drawn = np.concatenate([draw @ parts for draw in _draws(count)])
    value, _ = scorer.compute_score(option="closest", verbose=0)
    whole = Resampled(np.array(value, float), bleu(drawn), count)
    return [
        figure(f"BLEU-{order}", whole.estimate(order - 1), count, "")
        for order in range(1, ORDERS + 1)
    ]


def _bleu_parts(one: Mapping[str, Any]) -> list[float]:
    """Matching n-grams of each order, n-grams of each order, words, and words of the closest reference."""
    words = one["testlen"]
    closest = min((abs(length - words), length) for length in one["reflen"])[1]
    return [*one["correct"], *one["guess"], words, closest]


def bleu(parts: Floats) -> Floats:
    """BLEU-1 to BLEU-4 of sums of `_bleu_parts`, [rows, 10] -> [rows, 4]."""
    correct, guessed, (words, closest) = parts[:, :ORDERS], parts[:, ORDERS:-2], parts[:, -2:].T
    # The small numbers are those of the released code: without matches the score is all but 0.
    precision = np.cumprod((correct + 1e-15) / (guessed + 1e-9), axis=1)
    ratio = (words + 1e-15) / (closest + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return precision ** (1 / np.arange(1, ORDERS + 1)) * brevity[:, None]


def _draws(count: int) -> Iterator[Floats]:
    """How often each picture is drawn, float [some, count], until all resamples are drawn."""
    rng, step = np.random.default_rng(0), 100
    for _ in range(0, RESAMPLES, step):
        yield rng.multinomial(count, np.full(count, 1 / count), size=step).astype(float)


def _meteor_lacks(java: bool) -> str:
    return "" if java else "it needs Java"


def _spice_lacks(java: bool) -> str:
    """What is missing; pycocoevalcap would download its models, and nothing is downloaded here."""
    spec = importlib.util.find_spec("pycocoevalcap.spice")
    places = (spec and spec.submodule_search_locations) or []
    jars = [
        jar for place in places for jar in Path(place).glob("lib/stanford-corenlp-*-models.jar")
    ]
    if not java:
        return "it needs Java"
    return (
        ""
        if jars
        else "pycocoevalcap has no Stanford models beside it (its get_stanford_models.py)"
    )


def _with_java(name: str, references: Any, candidates: Any) -> float:
    if name == "METEOR":
        from pycocoevalcap.meteor.meteor import Meteor as Scorer
    else:
        from pycocoevalcap.spice.spice import Spice as Scorer
    with _quietly():
        return float(Scorer().compute_score(references, candidates)[0])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what these programs print out of the figures."""
    with tempfile.TemporaryFile() as sink, contextlib.redirect_stdout(io.StringIO()):
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
