"""Colors of classes: distinct, and the same for a class whatever the number of classes."""

from kdsweep.core import palette


def test_the_first_classes_have_distinct_colors_and_later_ones_darker_ones():
    colors = palette.class_colors(21)
    assert len({palette.BACKGROUND, *colors}) == 22
    assert colors[7:9] == [(0x73, 0x4F, 0x00), (0x2B, 0x5A, 0x74)]
    assert palette.class_colors(2) == colors[:2]
    assert palette.as_hex((0xE6, 0x9F, 0x00)) == "#E69F00"
