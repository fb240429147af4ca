"""Toy distributions of points in the plane, each about 2 across.

Each function maps a number of points n and a numpy generator to points [n, 2]; `TOYS` lists them by name.
"""

from collections.abc import Callable

import numpy as np

Toy = Callable[[int, np.random.Generator], np.ndarray]


def _rings(n: int, g: np.random.Generator) -> np.ndarray:
    angle, radius = g.uniform(0, 2 * np.pi, n), g.choice([0.5, 1.0], n) + 0.03 * g.normal(size=n)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _gaussians(n: int, g: np.random.Generator) -> np.ndarray:
    angle = g.integers(0, 8, n) * np.pi / 4
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.08 * g.normal(size=(n, 2))


def _swiss_roll(n: int, g: np.random.Generator) -> np.ndarray:
    t = 1.5 * np.pi * (1 + 2 * g.random(n))
    return t[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1) / (4.5 * np.pi) + 0.02 * g.normal(size=(n, 2))


def _heart(n: int, g: np.random.Generator) -> np.ndarray:
    t = g.uniform(0, 2 * np.pi, n)
    outline = np.stack([16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)], axis=1)
    return outline / 17 + 0.02 * g.normal(size=(n, 2))


TOYS: dict[str, Toy] = {"rings": _rings, "gaussians": _gaussians, "swiss_roll": _swiss_roll, "heart": _heart}
