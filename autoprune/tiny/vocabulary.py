"""What a scene can hold: colours, shapes, digits, letters, and the geometry of the picture."""

from __future__ import annotations

IMAGE_SIZE = 96
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "green": (40, 165, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 215, 45),
    "purple": (150, 50, 190),
    "orange": (245, 135, 30),
    "cyan": (60, 210, 220),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIGITS = "0123456789"
# Letters that stay apart at ten pixels: no I/J/L, no O/Q/D, no U/V/W twins.
LETTERS = "ABCEFGHKLMNPRSTXYZ"

COLOUR_NAMES = tuple(COLOURS)
CHARACTERS = DIGITS + LETTERS
