"""What a test sees of a picture: its texts and boxes, each where it stands, in the wide form or the narrow one."""

import re
import xml.etree.ElementTree as ET


def parts(svg, narrow=False):
    """(element, x, y) of each drawn element of a form, and the form's (width, height)."""
    root = ET.fromstring(svg)
    width, height = map(float, (root.get("data-narrow") if narrow else root.get("viewBox")[4:]).split())
    found = []

    def walk(element, x, y):
        look = element.get("class", "")
        if look == ("kvmbook-wide" if narrow else "kvmbook-narrow"):
            return
        if narrow and element.get("data-narrow") and element is not root:
            dx, dy = map(float, element.get("data-narrow").split())
        else:
            moved = re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform", ""))
            dx, dy = (float(moved[1]), float(moved[2])) if moved else (0, 0)
        if element.get("x") is not None:
            found.append((element, x + dx + float(element.get("x")), y + dy + float(element.get("y"))))
        for child in element:
            walk(child, x + dx, y + dy)

    walk(root, 0, 0)
    return found, (width, height)


def texts_of(picture):
    """All that a picture says; its text alternative is there."""
    root = ET.fromstring(picture.svg)
    assert root.get("role") == "img" and root[0].tag.endswith("title") and len(root[0].text) > 20
    return [element.text or "" for element, _, _ in parts(picture.svg)[0] if element.tag.endswith("text")]


def moment(svg, number):
    """What a moment says in a picture: the texts that it changes or brings, and those that stay as they were."""
    groups = [one for one in ET.fromstring(svg).iter() if one.get("data-moment") == str(number)]
    parts = [part for group in groups for part in group.iter()]
    same = {text for one in parts if one.get("class") == "kvmbook-same" for text in one.iter()}
    said = [one for one in parts if one.tag.endswith("text") and one.text]
    return [one.text for one in said if one not in same], [one.text for one in said if one in same]


def overlapping(picture, narrow=False, letter=0.56):
    """Texts that overlap if a letter is ``letter`` of its size wide; and such as leave the picture."""
    found, boxes = [], []
    placed, (right, bottom) = parts(picture.svg, narrow)
    for element, x, y in placed:
        if element.tag.endswith("text") and element.text:
            size = float(element.get("font-size", 14))
            width = len(element.text) * size * letter
            left = {"start": x, "end": x - width}.get(element.get("text-anchor"), x - width / 2)
            boxes.append((left, left + width, y - size * 0.8, y, element.text))
            found += [element.text] * (left < -1 or left + width > right + 1 or y - size < -2 or y > bottom)
    for number, (left, end, top, low, said) in enumerate(boxes):
        for other_left, other_end, other_top, other_low, other in boxes[:number]:
            if left < other_end and other_left < end and top < other_low and other_top < low:
                found.append((said, other))
    return found


def carries_all(panel, combinations):
    """Assert that a panel carries each of so many combinations, in 400 KB, and what a fresh one would say of every fifth."""
    assert len(panel.states) == len(panel.combinations()) == combinations
    assert sum(len(str(state)) for state in panel.states.values()) < 400_000
    for combination in panel.combinations()[::5]:
        assert panel._state(combination) == panel.states[" | ".join(combination)]
