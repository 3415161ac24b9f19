"""Questions about a scene, with their answers: easy, hard, and extra kinds beside the two."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from autoprune.tiny.scenes import Scene, SceneObject, draw_scene
from autoprune.tiny.vocabulary import COLOUR_NAMES, IMAGE_SIZE, PATCH_SIZE, SHAPES

Objects = Sequence[SceneObject]
Drawn = tuple[str, str]

EASY = ("colour", "shape", "digit", "exists")
HARD = ("count", "relation", "compare", "sign", "sum")
EXTRA = ("where", "side", "describe")
KINDS = EASY + HARD + EXTRA
MAX_COUNT = 5
# How often scenes offer a query with each count: rare counts are asked for more often.
_COUNT_WEIGHTS = (1.0, 1.0, 1.4, 2.2, 4.0, 8.0)
_SIDES = {
    "on the left": (0, -1),
    "on the right": (0, 1),
    "at the top": (1, -1),
    "at the bottom": (1, 1),
}
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


@dataclass(frozen=True)
class Question:
    """A question about a scene; `difficulty` is "easy", "hard" or "extra"."""

    kind: str
    difficulty: str
    text: str
    answer: str


def ask(
    scene: Scene | Objects, rng: random.Random | int = 0, kinds: Sequence[str] | None = None
) -> list[Question]:
    """One question of each kind that the scene allows, in the order of `kinds` (default: all).

    A kind is left out where it has no single right answer, such as `sum` without two digits.
    """
    objects = scene.objects if isinstance(scene, Scene) else scene
    rng = random.Random(rng) if isinstance(rng, int) else rng
    wanted = KINDS if kinds is None else _checked(kinds)
    drawn = ((kind, _GENERATORS[kind](objects, rng)) for kind in wanted)
    return [Question(kind, difficulty_of(kind), *pair) for kind, pair in drawn if pair]


def difficulty_of(kind: str) -> str:
    """The label of a kind: "easy", "hard" or "extra"."""
    if kind in EASY:
        return "easy"
    return "hard" if kind in HARD else "extra"


def heldout_questions(
    count: int, kinds: Sequence[str] | None = None, seed: int = 0
) -> list[tuple[Scene, Question]]:
    """`count` questions about held-out scenes, one per scene, the kinds taking turns.

    Default kinds: EASY and HARD. Answers of a kind are balanced where it has few of them (yes and
    no, the counts 0 to 5): a scene that cannot give the answer whose turn it is is passed over.
    """
    wanted = EASY + HARD if kinds is None else _checked(kinds)
    rng = random.Random(seed)
    asked = {kind: Counter[str]() for kind in wanted}
    scenes = _heldout_scenes(seed)
    chosen: list[tuple[Scene, Question]] = []
    while len(chosen) < count:
        kind = wanted[len(chosen) % len(wanted)]
        scene, question = next(scenes), None
        for _ in range(4):
            found = ask(scene, rng, [kind])
            if found and _is_due(found[0], asked[kind]):
                question = found[0]
                break
        if question is not None:
            asked[kind][question.answer] += 1
            chosen.append((scene, question))
    return chosen


def is_correct(question: Question, answer_text: str) -> bool:
    """Whether an answer is the right one, whatever its case, outer spaces and final full stop."""
    return _normalised(answer_text) == _normalised(question.answer)


def _normalised(text: str) -> str:
    return " ".join(text.casefold().strip().rstrip(".").split())


def _checked(kinds: Sequence[str]) -> tuple[str, ...]:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        given = ", ".join(map(repr, kinds)) or "none"
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {given}")
    return tuple(kinds)


def _heldout_scenes(seed: int) -> Iterator[Scene]:
    # A million seeds apart: two evaluations with different seeds share no scene.
    index = seed * 1_000_000
    while True:
        yield draw_scene(index, "heldout")
        index += 1


def _is_due(question: Question, asked: Counter[str]) -> bool:
    answers = {"count": [str(n) for n in range(MAX_COUNT + 1)]}.get(question.kind, ["yes", "no"])
    if question.answer not in answers:
        return True
    return asked[question.answer] == min(asked[answer] for answer in answers)


def _shapes(objects: Objects) -> list[SceneObject]:
    return [item for item in objects if item.kind == "shape"]


def _digits(objects: Objects) -> list[SceneObject]:
    return [item for item in objects if item.kind == "digit"]


def _unique(objects: Objects) -> list[SceneObject]:
    """Shapes whose colour and shape together name one object."""
    shapes = _shapes(objects)
    names = Counter((item.colour, item.shape) for item in shapes)
    return [item for item in shapes if names[item.colour, item.shape] == 1]


def _ask_colour(objects: Objects, rng: random.Random) -> Drawn | None:
    shapes = _shapes(objects)
    counts = Counter(item.shape for item in shapes)
    single = [item for item in shapes if counts[item.shape] == 1]
    if not single:
        return None
    item = rng.choice(single)
    return f"what color is the {item.shape}?", item.colour


def _ask_shape(objects: Objects, rng: random.Random) -> Drawn | None:
    shapes = _shapes(objects)
    counts = Counter(item.colour for item in shapes)
    single = [item for item in shapes if counts[item.colour] == 1]
    if not single:
        return None
    item = rng.choice(single)
    return f"what shape is {item.colour}?", item.shape


def _ask_digit(objects: Objects, rng: random.Random) -> Drawn | None:
    digits = _digits(objects)
    return ("which digit is there?", digits[0].text) if len(digits) == 1 else None


def _ask_exists(objects: Objects, rng: random.Random) -> Drawn | None:
    """A pair that is there, or one whose colour or shape is there, but not together."""
    shapes = _shapes(objects)
    present = {(item.colour, item.shape) for item in shapes}
    if rng.random() < 0.5 and shapes:
        item = rng.choice(shapes)
        return f"is there {with_article(item.colour, item.shape)}?", "yes"
    colours = sorted({item.colour for item in shapes}) or COLOUR_NAMES
    kinds = sorted({item.shape for item in shapes}) or SHAPES
    for _ in range(20):
        same_colour = rng.random() < 0.5
        colour = rng.choice(colours if same_colour else COLOUR_NAMES)
        shape = rng.choice(SHAPES if same_colour else kinds)
        if (colour, shape) not in present:
            return f"is there {with_article(colour, shape)}?", "no"
    return None


def _ask_count(objects: Objects, rng: random.Random) -> Drawn | None:
    shapes = _shapes(objects)
    by_count: dict[int, list[str]] = {}
    for name in (*SHAPES, *COLOUR_NAMES):
        found = sum(name in (item.shape, item.colour) for item in shapes)
        if found <= MAX_COUNT:
            by_count.setdefault(found, []).append(_group(name))
    counts = list(by_count)
    number = rng.choices(counts, [_COUNT_WEIGHTS[n] for n in counts])[0]
    return f"how many {rng.choice(by_count[number])} are there?", str(number)


def _ask_relation(objects: Objects, rng: random.Random) -> Drawn | None:
    unique = _unique(objects)
    if len(unique) < 2:
        return None
    for _ in range(20):
        direction, (axis, sign) = rng.choice(list(_DIRECTIONS.items()))
        first, second = rng.sample(unique, 2)
        difference = (first.centre[axis] - second.centre[axis]) * sign
        if abs(difference) < PATCH_SIZE:
            continue
        if (difference > 0) != (rng.random() < 0.5):
            first, second, difference = second, first, -difference
        text = f"is the {_name(first)} {direction} the {_name(second)}?"
        return text, "yes" if difference > 0 else "no"
    return None


def _ask_compare(objects: Objects, rng: random.Random) -> Drawn | None:
    """More of one than of another; a "no" is as often a tie as a smaller number."""
    shapes = _shapes(objects)
    names = list(SHAPES if rng.random() < 0.5 else COLOUR_NAMES)
    found = {name: sum(name in (item.shape, item.colour) for item in shapes) for name in names}
    wanted = "yes" if rng.random() < 0.5 else "no"
    tie = rng.random() < 0.5
    pairs = [(first, second) for first in names for second in names if first != second]
    rng.shuffle(pairs)
    for first, second in pairs:
        more, less = found[first], found[second]
        if more == less == 0:
            continue
        if more > less if wanted == "yes" else (more == less if tie else more < less):
            return f"are there more {_group(first)} than {_group(second)}?", wanted
    return None


def _ask_sign(objects: Objects, rng: random.Random) -> Drawn | None:
    signs = [item for item in objects if item.kind == "sign"]
    return ("what does the sign say?", signs[0].text) if signs else None


def _ask_sum(objects: Objects, rng: random.Random) -> Drawn | None:
    digits = _digits(objects)
    if len(digits) != 2:
        return None
    return "what is the sum of the two digits?", str(sum(int(item.text) for item in digits))


def _ask_where(objects: Objects, rng: random.Random) -> Drawn | None:
    """The patch that holds an object's centre, rows and columns counted from 1."""
    digits = _digits(objects)
    named = [(item, _name(item)) for item in _unique(objects)]
    if len({item.text for item in digits}) == len(digits):
        named += [(item, f"digit {item.text}") for item in digits]
    if not named:
        return None
    item, name = rng.choice(named)
    row, column = item.patch
    return f"where is the {name}?", f"row {row + 1}, column {column + 1}"


def _ask_side(objects: Objects, rng: random.Random) -> Drawn | None:
    """Which half of the picture a shape is in; the first step towards `relation`."""
    unique = _unique(objects)
    if not unique:
        return None
    item = rng.choice(unique)
    side, (axis, sign) = rng.choice(list(_SIDES.items()))
    inside = (item.centre[axis] - IMAGE_SIZE / 2) * sign > 0
    return f"is the {_name(item)} {side}?", "yes" if inside else "no"


def _ask_describe(objects: Objects, rng: random.Random) -> Drawn | None:
    phrases = [_phrase(item) for item in sorted(objects, key=lambda item: item.centre)]
    return ("what is in the picture?", ", ".join(phrases) + ".") if phrases else None


def _phrase(item: SceneObject) -> str:
    if item.kind == "shape":
        return with_article(item.colour, item.shape)
    return f"the digit {item.text}" if item.kind == "digit" else f"a sign saying {item.text}"


def _name(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


def _group(name: str) -> str:
    """The plural that a colour or a shape is counted by."""
    if name in COLOUR_NAMES:
        return f"{name} shapes"
    return f"{name}es" if name.endswith("s") else f"{name}s"


def with_article(colour: str, shape: str) -> str:
    """ "a red circle", "an orange ring"."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


_GENERATORS: dict[str, Callable[[Objects, random.Random], Drawn | None]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "digit": _ask_digit,
    "exists": _ask_exists,
    "count": _ask_count,
    "relation": _ask_relation,
    "compare": _ask_compare,
    "sign": _ask_sign,
    "sum": _ask_sum,
    "where": _ask_where,
    "side": _ask_side,
    "describe": _ask_describe,
}
