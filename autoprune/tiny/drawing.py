"""Pixels of a scene: backgrounds, clutter and the masks of shapes, digits and letters."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from autoprune.tiny.vocabulary import IMAGE_SIZE

SUPERSAMPLING = 4
Pixels = NDArray[np.floating]


def draw_background(rng: np.random.Generator) -> Pixels:
    """A muted background with thin grey clutter, float32 [96, 96, 3] in 0..255."""
    first, second = (_muted_colour(rng) for _ in range(2))
    weight = _pattern(rng)[..., None]
    pixels = (first * (1 - weight) + second * weight).astype(np.float32)
    canvas = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    _draw_clutter(canvas, rng)
    return np.asarray(canvas, dtype=np.float32)


def _muted_colour(rng: np.random.Generator) -> Pixels:
    grey = rng.uniform(70, 150)
    return (grey + rng.uniform(-18, 18, size=3)).astype(np.float32)


def _pattern(rng: np.random.Generator) -> Pixels:
    """Blend weights in 0..1: a gradient, checks, stripes or soft blobs."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    kind = rng.integers(4)
    if kind == 0:
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.cos(angle) * x + np.sin(angle) * y
        return (ramp - ramp.min()) / (ramp.max() - ramp.min())
    if kind == 1:
        cell = rng.integers(6, 25)
        return 0.6 * ((x // cell + y // cell) % 2)
    if kind == 2:
        cell, slope = rng.integers(5, 20), rng.uniform(-1, 1)
        return 0.6 * (((x + slope * y) // cell) % 2)
    coarse = Image.fromarray((rng.random((6, 6)) * 255).astype(np.uint8))
    soft = coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(soft, dtype=np.float32) / 255


def _draw_clutter(canvas: Image.Image, rng: np.random.Generator) -> None:
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 7)):
        grey = int(rng.integers(40, 190))
        start = rng.integers(0, IMAGE_SIZE, size=2)
        end = start + rng.integers(-30, 31, size=2)
        pen.line([tuple(start.tolist()), tuple(end.tolist())], fill=(grey,) * 3, width=1)
    for _ in range(rng.integers(0, 16)):
        grey = int(rng.integers(30, 210))
        left, top = rng.integers(0, IMAGE_SIZE, size=2).tolist()
        pen.rectangle([left, top, left + int(rng.integers(2)), top], fill=(grey,) * 3)


@lru_cache(maxsize=512)
def shape_mask(shape: str, size: int) -> Pixels:
    """Coverage in 0..1 of a shape that fills a `size` x `size` box, [size, size]."""
    full = size * SUPERSAMPLING
    canvas = Image.new("L", (full, full), 0)
    pen = ImageDraw.Draw(canvas)
    edge = full - 1
    if shape == "circle":
        pen.ellipse([0, 0, edge, edge], fill=255)
    elif shape == "square":
        pen.rectangle([0, 0, edge, edge], fill=255)
    elif shape == "triangle":
        pen.polygon([(0, edge), (edge, edge), (edge / 2, 0)], fill=255)
    elif shape == "cross":
        near, far = round(full * 0.34), round(full * 0.66)
        pen.rectangle([0, near, edge, far], fill=255)
        pen.rectangle([near, 0, far, edge], fill=255)
    elif shape == "ring":
        pen.ellipse([0, 0, edge, edge], fill=255)
        rim = round(full * 0.25)
        pen.ellipse([rim, rim, edge - rim, edge - rim], fill=0)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def digit_mask(strokes: Pixels, size: int, warp: np.random.Generator | None = None) -> Pixels:
    """Ink of a handwritten digit, [size, size] in 0..1, from its 8x8 strokes in 0..16.

    With `warp` the digit is turned, sheared and stretched at random: a few hundred samples then
    stand for many more hands.
    """
    canvas = Image.fromarray((strokes * (255 / 16)).astype(np.uint8))
    canvas = canvas.resize((size, size), Image.Resampling.BICUBIC)
    if warp is not None:
        turn, shear = warp.uniform(-0.25, 0.25), warp.uniform(-0.25, 0.25)
        stretch = np.diag(1 / warp.uniform(0.85, 1.1, size=2))
        spin = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        matrix = spin @ np.array([[1, shear], [0, 1]]) @ stretch
        shift = (size / 2 + warp.uniform(-0.5, 0.5, size=2)) - matrix @ np.full(2, size / 2)
        coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
        canvas = canvas.transform(
            (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
        )
    boldness = 200 if warp is None else warp.uniform(150, 255)
    return np.clip(np.asarray(canvas, dtype=np.float32) / boldness, 0, 1)


@lru_cache(maxsize=512)
def letter_mask(letter: str, height: int) -> Pixels:
    """Ink of a printed letter cropped to its own box, [height, width] in 0..1."""
    font = ImageFont.load_default(size=height * SUPERSAMPLING * 1.4)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(letter))
    canvas = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(canvas).text((-left, -top), letter, fill=255, font=font)
    width = max(4, round(height * canvas.width / canvas.height))
    small = canvas.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def paint(pixels: Pixels, mask: Pixels, left: int, top: int, colour: Pixels) -> None:
    """Blend `colour` into `pixels` in place where `mask` covers it."""
    height, width = mask.shape
    window = pixels[top : top + height, left : left + width]
    window += mask[..., None] * (colour - window)
