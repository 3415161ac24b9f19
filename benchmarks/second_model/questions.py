"""Questions about a scene, with their answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scenes import CELLS, COLOURS, SYMBOLS, Scene, Thing, draw_scene

EASY = ("colour", "presence", "word", "digit")
HARD = ("count", "relation", "sum", "neighbour", "place")
# What the model learns first, and what long answers are asked of.
EXTRA = ("cell", "list")
KINDS = EASY + HARD + EXTRA
MAX_COUNT = 4

_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "middle", "right")


@dataclass(frozen=True)
class Question:
    """A question about a scene and its one right answer."""

    kind: str
    text: str
    answer: str


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of a kind, or None where the scene allows none."""
    drawn = _ASK[kind](scene.things, rng)
    return drawn and Question(kind, *drawn)


def heldout_questions(
    per_kind: int, kinds: Sequence[str] = EASY + HARD, seed: int = 0
) -> list[tuple[Scene, Question]]:
    """Held-out questions, each about a scene of its own, the kinds taking turns.

    Answers of yes or no and counts are balanced: a scene whose answer is not due is passed over.
    """
    rng = random.Random(seed)
    asked = {kind: Counter[str]() for kind in kinds}
    scenes = _heldout_scenes(seed)
    chosen: list[tuple[Scene, Question]] = []
    while len(chosen) < per_kind * len(kinds):
        kind = kinds[len(chosen) % len(kinds)]
        scene = next(scenes)
        question = ask(scene, kind, rng)
        if question and _is_due(question, asked[kind]):
            asked[kind][question.answer] += 1
            chosen.append((scene, question))
    return chosen


def floor_without_picture(questions: Sequence[Question]) -> float:
    """How many would be right by the commonest answer to each wording, at best."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.text, Counter())[question.answer] += 1
    by_wording = sum(max(found.values()) for found in answers.values())
    commonest = max(Counter(question.answer for question in questions).values())
    # With few questions of a wording, its commonest answer is known only by hindsight.
    return (commonest if len(answers) * 5 > len(questions) else by_wording) / len(questions)


def _heldout_scenes(seed: int) -> Iterator[Scene]:
    # Ten million seeds apart: evaluations with different seeds share no scene.
    index = seed * 10_000_000
    while True:
        yield draw_scene(index, "heldout")
        index += 1


def _is_due(question: Question, asked: Counter[str]) -> bool:
    if question.kind == "count":
        answers = [str(number) for number in range(MAX_COUNT + 1)]
    elif question.kind in ("presence", "relation"):
        answers = ["yes", "no"]
    else:
        return True
    return asked[question.answer] == min(asked[answer] for answer in answers)


def _symbols(things: Sequence[Thing]) -> list[Thing]:
    return [thing for thing in things if thing.kind == "symbol"]


def _single(things: Sequence[Thing]) -> list[Thing]:
    """Symbols whose name comes once."""
    counts = Counter(thing.name for thing in _symbols(things))
    return [thing for thing in _symbols(things) if counts[thing.name] == 1]


def _digits(things: Sequence[Thing]) -> list[Thing]:
    return [thing for thing in things if thing.kind == "digit"]


Drawn = tuple[str, str]


def _colour(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    single = _single(things)
    if not single:
        return None
    thing = rng.choice(single)
    return f"Which colour does the {thing.name} have?", thing.colour


def _presence(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    shown = sorted({thing.name for thing in _symbols(things)})
    if rng.random() < 0.5:
        return f"Can you see {_with_article(rng.choice(shown))} in the picture?", "yes"
    name = rng.choice([name for name in SYMBOLS if name not in shown])
    return f"Can you see {_with_article(name)} in the picture?", "no"


def _word(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    words = [thing.name for thing in things if thing.kind == "word"]
    return ("Read the printed word.", words[0]) if words else None


def _digit(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    digits = _digits(things)
    return ("Which digit was written by hand?", digits[0].name) if len(digits) == 1 else None


def _count(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    by_colour = rng.random() < 0.5
    names = list(COLOURS) if by_colour else list(SYMBOLS)
    counts = Counter(thing.colour if by_colour else thing.name for thing in _symbols(things))
    by_count: dict[int, list[str]] = {}
    for name in names:
        by_count.setdefault(counts[name], []).append(name)
    allowed = [number for number in by_count if number <= MAX_COUNT]
    # Large counts are rare: ask for them where there are some.
    number = rng.choices(allowed, [(1, 1, 2, 4, 8)[number] for number in allowed])[0]
    name = rng.choice(by_count[number])
    return f"Count the {f'{name} symbols' if by_colour else f'{name}s'}.", str(number)


def _relation(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    single = _single(things)
    axis = rng.randrange(2)
    pairs = [
        (one, two) for one in single for two in single if one.cells[0][axis] != two.cells[0][axis]
    ]
    if not pairs:
        return None
    one, two = rng.choice(pairs)
    how = ("higher up", "further left")[axis]
    answer = "yes" if one.cells[0][axis] < two.cells[0][axis] else "no"
    return f"Is the {one.name} {how} than the {two.name}?", answer


def _sum(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    digits = _digits(things)
    if len(digits) != 2:
        return None
    return "Add up the two digits.", str(sum(int(digit.name) for digit in digits))


def _neighbour(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    by_cell = {thing.cells[0]: thing for thing in _symbols(things)}
    steps = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
    found = []
    for thing in _single(things):
        row, column = thing.cells[0]
        for side, (down, right) in steps.items():
            beside = by_cell.get((row + down, column + right))
            if beside:
                found.append((thing, side, beside))
    if not found:
        return None
    thing, side, beside = rng.choice(found)
    where = {"left": "to the left of", "right": "to the right of"}.get(side, f"just {side}")
    return f"Which colour has the symbol {where} the {thing.name}?", beside.colour


def _place(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    single = _single(things)
    if not single:
        return None
    thing = rng.choice(single)
    axis = rng.randrange(2)
    answer = (_ROWS, _COLUMNS)[axis][thing.cells[0][axis]]
    return f"In which {('row', 'column')[axis]} is the {thing.name}?", answer


def _cell(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    row, column = rng.randrange(CELLS), rng.randrange(CELLS)
    found = [_described(thing) for thing in things if (row, column) in thing.cells]
    place = f"{_ROWS[row]} {_COLUMNS[column]}"
    return f"What is at the {place}?", found[0] if found else "nothing"


def _list(things: Sequence[Thing], rng: random.Random) -> Drawn | None:
    rows = []
    for row in range(CELLS):
        inside = sorted(
            (thing for thing in things if thing.cells[0][0] == row),
            key=lambda thing: thing.cells[0][1],
        )
        rows.append(", ".join(map(_described, inside)) or "nothing")
    return "List all things row by row.", "; ".join(rows)


def _described(thing: Thing) -> str:
    return f"{thing.colour or thing.kind} {thing.name}"


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


_ASK: dict[str, Callable[[Sequence[Thing], random.Random], Drawn | None]] = {
    "colour": _colour,
    "presence": _presence,
    "word": _word,
    "digit": _digit,
    "count": _count,
    "relation": _relation,
    "sum": _sum,
    "neighbour": _neighbour,
    "place": _place,
    "cell": _cell,
    "list": _list,
}
