"""Scores of captions by pycocoevalcap, beside values worked out apart from it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter

import numpy as np
import pytest

from autoprune.evaluation.scorers import Sources, captions, score

# In a plain environment only the tests without pycocoevalcap run.
needs_pycocoevalcap = pytest.mark.skipif(
    captions.importlib.util.find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap"
)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

REFERENCES = {
    "1": ["a dog runs on the grass", "the brown dog is running"],
    "2": ["a cat sleeps", "a cat is on a red mat now"],
    "3": ["two men play football in the rain", "men playing a game"],
}
CANDIDATES = {"1": "a brown dog runs on grass", "2": "a cat is on a mat", "3": "a game"}


def files(folder, references, candidates):
    records = [
        {"image_id": int(image), "id": i, "caption": text}
        for image, texts in references.items()
        for i, text in enumerate(texts)
    ]
    annotations = folder / "captions.json"
    annotations.write_text(json.dumps({"images": [], "annotations": records}))
    answers = folder / "answers.jsonl"
    lines = [{"question_id": image, "text": text} for image, text in candidates.items()]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return answers, Sources(annotations)


def without_java(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)


def values(found):
    return {figure.name: figure.value for figure in found.figures}


def grams(text, order):
    words = text.split()
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def slow_cider(references, candidates):
    """CIDEr-D by its formula: tf-idf vectors of n-grams, clipped, with a penalty for other lengths."""
    count = len(references)
    total = []
    for image, candidate in candidates.items():
        by_order = []
        for order in range(1, 5):

            def weighted(text, order=order):
                found = {}
                for gram, times in grams(text, order).items():
                    seen = sum(
                        any(gram in grams(other, order) for other in texts)
                        for texts in references.values()
                    )
                    found[gram] = times * (math.log(count) - math.log(max(1, seen)))
                return found

            own = weighted(candidate)
            similar = []
            for reference in references[image]:
                their = weighted(reference)
                shared = sum(min(own[g], their[g]) * their[g] for g in own if g in their)
                lengths = [
                    math.sqrt(sum(v * v for v in vector.values())) for vector in (own, their)
                ]
                apart = len(candidate.split()) - len(reference.split())
                cosine = shared / math.prod(lengths) if all(lengths) else 0.0
                similar.append(cosine * math.exp(-(apart**2) / (2 * 6.0**2)))
            by_order.append(sum(similar) / len(similar))
        total.append(10 * sum(by_order) / 4)
    return sum(total) / len(total)


@needs_pycocoevalcap
def test_figures_worked_out_apart(tmp_path, monkeypatch):
    without_java(monkeypatch)
    found = values(score("coco-caption", *files(tmp_path, REFERENCES, CANDIDATES)))
    # Words: 6 of 6 (a, brown, dog, runs, on, grass), 6 of 6 and 2 of 2; closest references have 6, 8 or 3
    # words (3 is 3 away, 8 is 2 away), and 4. So 14 of 14, and the candidates are short of 18 words by 4.
    short = math.exp(1 - 18 / 14)
    assert found["BLEU-1"] == pytest.approx(short, abs=1e-6)
    # Pairs: brown dog, dog runs, runs on of 5; a cat, cat is, is on, on a of 5; a game of 1.
    assert found["BLEU-2"] == pytest.approx(short * math.sqrt(14 / 14 * 8 / 11), abs=1e-6)

    # Longest common subsequences over words: of 1, "a dog runs on grass" 5 of 6 and 6, "brown dog" 2 of 6
    # and 5; of 2, 6 of 6 and 8 (the best of each side is taken); of 3, 2 of 2 and 4.
    def rouge(precision, recall):
        return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)

    expected = [rouge(5 / 6, 5 / 6), rouge(1, 6 / 8), rouge(1, 2 / 4)]
    assert found["ROUGE-L"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["CIDEr"] == pytest.approx(slow_cider(REFERENCES, CANDIDATES), abs=1e-6)


@needs_pycocoevalcap
def test_what_is_not_comparable_is_said(tmp_path, monkeypatch):
    without_java(monkeypatch)
    found = score("coco-caption", *files(tmp_path, REFERENCES, CANDIDATES))
    notes = "\n".join(found.notes)
    assert "compare these figures with each other only" in notes
    assert "no METEOR: it needs Java" in notes
    assert "no SPICE: it needs Java" in notes
    assert set(values(found)) == {"CIDEr", "ROUGE-L", *(f"BLEU-{i}" for i in range(1, 5))}


@needs_pycocoevalcap
@needs_java
def test_with_java_the_tokens_are_those_of_the_challenge(tmp_path):
    texts = {
        "1": ["A man's dog (brown) isn't here.", ""],
        "2": ["two\rlines\u2028and\nmore", "end"],
    }
    references, _, notes = captions.tokenized(texts, texts)
    assert references == {
        "1": ["a man 's dog -lrb- brown -rrb- is n't here", ""],
        "2": ["two lines and more", "end"],
    }
    assert notes == []
    found = score("coco-caption", *files(tmp_path, REFERENCES, CANDIDATES))
    assert 0 < values(found)["METEOR"] < 1
    if not any("no SPICE" in note for note in found.notes):
        assert 0 < values(found)["SPICE"] < 1


@needs_pycocoevalcap
def test_a_java_that_fails_is_no_score_of_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ValueError, match="Java did not run"):
        score("coco-caption", *files(tmp_path, REFERENCES, CANDIDATES))


@needs_pycocoevalcap
def test_a_perfect_caption_and_a_missing_one(tmp_path, monkeypatch):
    without_java(monkeypatch)
    references = {str(i): [f"word{i} of the picture number {i}"] for i in range(12)}
    own = {image: texts[0] for image, texts in references.items()}
    whole = score("coco-caption", *files(tmp_path, references, own))
    assert values(whole)["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert values(whole)["ROUGE-L"] == 1
    assert values(whole)["CIDEr"] == pytest.approx(10)
    rouge = next(figure for figure in whole.figures if figure.name == "ROUGE-L")
    assert (rouge.low, rouge.high) == (1, 1)
    del own["3"]
    short = score("coco-caption", *files(tmp_path, references, own))
    assert short.missing == ["3"]
    assert values(short)["ROUGE-L"] == pytest.approx(11 / 12)
    bleu = next(figure for figure in short.figures if figure.name == "BLEU-4")
    assert bleu.low < bleu.value < bleu.high


@needs_pycocoevalcap
def test_bleu_of_sums_is_that_of_the_released_code():
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for image, text in CANDIDATES.items():
        scorer += (text, REFERENCES[image])
    parts = np.array([captions._bleu_parts(one) for one in scorer.ctest], float)
    expected, _ = scorer.compute_score(option="closest")
    assert captions.bleu(parts.sum(axis=0)[None])[0] == pytest.approx(expected, rel=1e-9)


def test_the_picture_is_found_by_id_or_by_the_name_of_its_file():
    from autoprune.evaluation.scorers.reading import Answer

    assert captions.keys(Answer("391895", "", "", 1)) == [("391895",), ("391895",)]
    name = "COCO_val2014_000000391895.jpg"
    assert captions.keys(Answer(name, "", "", 1)) == [(name,), ("391895",)]


def test_without_pycocoevalcap_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'autoprune\[eval\]'"):
        score("coco-caption", *files(tmp_path, REFERENCES, CANDIDATES))
