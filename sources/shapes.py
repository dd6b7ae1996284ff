"""An embedded data set of simple shapes, made from a seed, so that everything can be tried with no download.

Ten classes of shapes at random place, size, turn and colour over random textured backgrounds. Colour, area and place are drawn before
the class and from the same distributions for all classes, so that only the outline tells the class.
"""
from typing import Dict, List, Tuple

import numpy as np

from commands import UserError
from sources import image_files

# Corners of the shapes that are polygons; each is later scaled to the wanted area, so their size here is
# arbitrary.
_STAR = [(r * np.sin(a), r * np.cos(a)) for a, r in zip(np.arange(10) * np.pi / 5, [1.0, 0.4] * 5)]
POLYGONS: Dict[str, List[Tuple[float, float]]] = {
    "triangle": [(0.0, 1.0), (0.866, -0.5), (-0.866, -0.5)],
    "square": [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
    "bar": [(-1.0, -0.25), (1.0, -0.25), (1.0, 0.25), (-1.0, 0.25)],
    "cross": [(-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3),
              (0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3)],
    "star": _STAR,
    "corner": [(-0.8, -0.8), (0.8, -0.8), (0.8, -0.25), (-0.25, -0.25), (-0.25, 0.8), (-0.8, 0.8)],
    "arrow": [(-0.2, -1.0), (0.2, -1.0), (0.2, 0.1), (0.75, 0.1), (0.0, 1.0), (-0.75, 0.1), (-0.2, 0.1)],
}
CLASS_NAMES = ("circle", "ring", "crescent") + tuple(POLYGONS)

# Shares of the image's area. The smallest is 9 x 9 pixels of 32 x 32, below which a star is a blot.
SMALLEST_AREA, LARGEST_AREA = 0.08, 0.2
_CHUNK_PIXELS = 1 << 19  # pixels drawn at a time, which bounds the memory for intermediate results


def signed_distance(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of the points (x, y) from the outline of a shape centred at 0: negative inside, positive outside.

    The formula for polygons is that of https://iquilezles.org/articles/distfunctions2d: the least distance to an edge, its sign by
    counting the edges that a ray crosses.
    """
    if kind == "circle":
        return np.hypot(x, y) - 1
    if kind == "ring":
        return np.abs(np.hypot(x, y) - 0.8) - 0.2
    if kind == "crescent":
        return np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.55, y))
    corners = np.array(POLYGONS[kind])
    squared, sign = np.full_like(x, np.inf), np.ones_like(x)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0)):
        ex, ey, wx, wy = x1 - x0, y1 - y0, x - x0, y - y0
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        above, below, left = y >= y0, y < y1, ex * wy > ey * wx
        sign[(above & below & left) | ~(above | below | left)] *= -1
    return sign * np.sqrt(squared)


def _area_and_radius(kind: str) -> Tuple[float, float]:
    """The area of a shape and the radius of its circumscribed circle about 0, measured on a fine grid."""
    places = (np.arange(300) + 0.5) * 0.01 - 1.5
    x, y = np.meshgrid(places, places)
    inside = signed_distance(kind, x, y) < 0
    return inside.sum() * 0.01 ** 2, np.hypot(x, y)[inside].max()


def make(number: int, seed: Tuple[int, int], image_size: int = 32) -> Tuple[np.ndarray, np.ndarray]:
    """Draw `number` images; the same seed gives the same images.

    Returns uint8 images (number, image_size, image_size, 3) and int64 labels (number,), whose classes are equally frequent to within
    one. Raises UserError if an image cannot hold a shape.
    """
    if number < 1 or image_size < 16:
        raise UserError("The shapes data set was asked for %d images of %d x %d pixels; it needs at least 1 "
                        "image of 16 x 16." % (number, image_size, image_size))
    random = np.random.RandomState(seed)
    labels = random.permutation(np.arange(number) % len(CLASS_NAMES))
    images = image_files.empty(number, image_size)
    measures = np.array([_area_and_radius(kind) for kind in CLASS_NAMES])
    chunk = max(1, _CHUNK_PIXELS // image_size ** 2)
    for start in range(0, number, chunk):
        part = slice(start, start + chunk)
        images[part] = _draw(labels[part], random, image_size, measures)
    return images, labels.astype(np.int64)


def _draw(labels: np.ndarray, random: np.random.RandomState, size: int, measures: np.ndarray) -> np.ndarray:
    """Draw one image a label. `measures` holds each class's area and radius."""
    n = len(labels)
    background, base = _background(n, random, size)
    # The farthest of a few random colours from the background's, or one shape in ten could not be seen.
    colours = random.uniform(0, 1, (n, 4, 3))
    farthest = np.argmax(np.abs(colours - base[:, None]).sum(-1), axis=1)
    colour = colours[np.arange(n), farthest][:, None, None]

    area = size ** 2 * np.exp(random.uniform(np.log(SMALLEST_AREA), np.log(LARGEST_AREA), n))
    # The widest class at this area decides how far from the middle a shape may lie, so that place tells no
    # class.
    widest = np.max(measures[:, 1] / np.sqrt(measures[:, 0]))
    room = np.maximum(size / 2 - widest * np.sqrt(area), 0)
    centre = size / 2 + random.uniform(-1, 1, (2, n)) * room
    turn = random.uniform(0, 2 * np.pi, n)

    mask = np.empty((n, size, size))
    pixels = np.arange(size) + 0.5
    for label, kind in enumerate(CLASS_NAMES):
        mine = np.flatnonzero(labels == label)
        scale = np.sqrt(area[mine] / measures[label, 0])[:, None, None]
        x = (pixels[None, None, :] - centre[0, mine, None, None]) / scale
        y = (pixels[None, :, None] - centre[1, mine, None, None]) / scale
        cos, sin = np.cos(turn[mine])[:, None, None], np.sin(turn[mine])[:, None, None]
        distance = signed_distance(kind, cos * x + sin * y, cos * y - sin * x)
        mask[mine] = np.clip(0.5 - distance * scale, 0, 1)  # a smooth edge, one pixel wide
    mask = mask[..., None]
    image = mask * colour + (1 - mask) * background + random.normal(0, 0.03, background.shape)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def _background(n: int, random: np.random.RandomState, size: int) -> Tuple[np.ndarray, np.ndarray]:
    """Random colours with waves over them: (n, size, size, 3), and the colours alone, (n, 3), all about [0, 1]."""
    base = random.uniform(0, 1, (n, 3))
    background = np.tile(base[:, None, None], (1, size, size, 1))
    place = np.arange(size) / size
    for _ in range(3):
        across, down = random.normal(0, 3, (2, n, 1, 1))  # periods in the width of an image
        phase = random.uniform(0, 2 * np.pi, (n, 1, 1))
        wave = np.sin(2 * np.pi * (across * place[None, None, :] + down * place[None, :, None]) + phase)
        background += wave[..., None] * random.normal(0, 0.06, (n, 1, 1, 3))
    return background, base
