"""Top-view images, without OpenGL."""

import dataclasses
from collections.abc import Iterable

from PIL import Image, ImageDraw


@dataclasses.dataclass(frozen=True)
class Disc:
    """A disc of an image, in world units; `hollow` draws a ring."""

    x: float
    y: float
    radius: float
    colour: str
    hollow: bool = False


def discs(size: int, extent: float, shapes: Iterable[Disc]) -> Image.Image:
    """Returns a square image, `size` pixels wide, of the world's [-extent, extent]^2 with y upward."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    scale = size / (2 * extent)
    draw.rectangle((0, 0, size - 1, size - 1), outline="dimgray", width=max(1, size // 100))
    for disc in shapes:
        x, y, radius = (extent + disc.x) * scale, (extent - disc.y) * scale, disc.radius * scale
        box = (x - radius, y - radius, x + radius, y + radius)
        if disc.hollow:
            draw.ellipse(box, outline=disc.colour, width=max(1, size // 100))
        else:
            draw.ellipse(box, fill=disc.colour)
    return image
