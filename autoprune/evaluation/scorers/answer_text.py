"""How the evaluators of TextVQA, VQAv2 and VizWiz read an answer, and score it against those of people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The released pattern, `(?!<=\d)(\.)(?!\d)`, means this: its first part holds before any point.
_POINT = re.compile(r"\.(?!\d)")
# The released code hands `re.UNICODE`, which is 32, to `sub` where the highest count stands.
_POINTS_AT_MOST = 32
_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_DIGITS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _missing_apostrophe() -> dict[str, str]:
    """Contractions that lack one apostrophe, and as they should be written."""
    right = {"somebody'd": "somebodyd"}  # the released table has this one the other way round
    for word in _CONTRACTIONS.split():
        for place, letter in enumerate(word):
            if letter == "'":
                right[word[:place] + word[place + 1 :]] = word
    return right


_RIGHT = _missing_apostrophe()


# People answer many questions alike, and there are ten answers to each.
@lru_cache(maxsize=2**16)
def evalai(text: str) -> str:
    """An answer as EvalAI's processor leaves it, which LLaVA applies to TextVQA, VQAv2 and VizWiz.

    Lower case; commas, question marks and articles go; number words up to ten become digits; punctuation
    goes or becomes a space; an "'s" stands alone.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return without_articles(without_marks(in_one_line(text)))


@lru_cache(maxsize=2**16)
def vqa_answer(text: str) -> str:
    """An answer as VQA's evaluator leaves it, which does not part "'s" from its word."""
    return without_articles(without_marks(text))


def in_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_marks(text: str) -> str:
    """Punctuation goes where a space is beside it or a comma parts a number; elsewhere it becomes a space.

    A mark that has a space beside it in one place goes everywhere. Points stay before a digit.
    """
    parts_number = _COMMA_IN_NUMBER.search(text) is not None
    left = text
    for mark in _MARKS:
        goes = parts_number or f"{mark} " in text or f" {mark}" in text
        left = left.replace(mark, "" if goes else " ")
    return _POINT.sub("", left, count=_POINTS_AT_MOST)


def without_articles(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe."""
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_RIGHT.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3), averaged over leaving out each person's answer in turn.

    Args:
        prediction, answers: processed in the same way.
    """
    same = sum(answer == prediction for answer in answers)
    if not same:
        return 0.0
    # Leaving out one of the answers that match leaves a match less.
    others = len(answers) - same
    total = same * min(1.0, (same - 1) / 3) + others * min(1.0, same / 3)
    return total / len(answers)
