"""How much two colours differ, as WCAG 2 counts it: text needs 4.5."""

import re


def luminance(colour):
    """Of "#rrggbb" or "rgb(r, g, b)", as WCAG defines it."""
    numbers = (
        [int(colour[at : at + 2], 16) for at in (1, 3, 5)] if colour[0] == "#" else map(int, re.findall(r"\d+", colour))
    )
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (n / 255 for n in numbers)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)
