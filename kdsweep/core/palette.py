"""Colors of the classes in masks, overlays, figures and legends: RGB, which the color-blind tell apart.

Okabe and Ito's, without black, in an order that contrasts with gray ultrasound images.
"""

from __future__ import annotations

Color = tuple[int, int, int]
BACKGROUND: Color = (0, 0, 0)
COLORS: tuple[Color, ...] = (
    (0xE6, 0x9F, 0x00),  # orange
    (0x56, 0xB4, 0xE9),  # sky blue
    (0xF0, 0xE4, 0x42),  # yellow
    (0x00, 0x9E, 0x73),  # bluish green
    (0xD5, 0x5E, 0x00),  # vermilion
    (0xCC, 0x79, 0xA7),  # reddish purple
    (0x00, 0x72, 0xB2),  # blue
)


def class_colors(count: int) -> list[Color]:
    """Return the colors of so many classes; after each round of COLORS they begin again, at half the brightness."""
    rounds = ((COLORS[index % len(COLORS)], 2 ** (index // len(COLORS))) for index in range(count))
    return [(red // half, green // half, blue // half) for (red, green, blue), half in rounds]


def as_hex(color: Color) -> str:
    """Return a color as ``#RRGGBB``."""
    return "#{:02X}{:02X}{:02X}".format(*color)
