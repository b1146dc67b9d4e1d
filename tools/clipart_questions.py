"""Questions of composition over the clip art, as SugarCrepe asks them: is the picture's caption this or that?

The false caption comes from the true one by exchanging its object or its attribute: for another that some picture of
the same group has (replace_obj, replace_att), or with that of another picture's caption, which gets this one's in turn
(swap_obj, swap_att). Colours of two things in one caption change places as well.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

_FORMS = {
    "icon": r"(?P<object>.+) icon, (?P<attribute>\w+) style",
    "card": r"(?P<object>\w+) of (?P<attribute>\w+) playing card, \w+ style",
    "LED": r"LED (?P<object>.+) \(\w+\)",
    "flag": r"Flag of (?P<object>.+)",
    "map": r"Map of (?P<object>[^,]+)(, outline|, black)?",
    "pictogram": r"(White on black p|P)ictogram: (?P<object>.+)",
    "road sign": r"Road sign: (?P<object>.+)",
    "maritime": r"Maritime signal flag: (?P<object>.+)",
    "semaphore": r"Semaphore flag signal: (?P<object>.+)",
    "hotel": r"Hotel Icon (?P<object>.+)",
    "drawing": r"(?P<object>[\w ]+), black and white",
}
"""Whole captions that say which words are the object and which the attribute."""
_NOUNS = {
    "animal": "ant butterfly camel deer echidna elephant flamingo fox gull ibex kangaroo monkey mosquito penguin pig "
    "rooster seahorse swan tiger",
    "instrument": "flute oboe trumpet violin",
    "thing": "balloon boomerang bottle broom calculator camera chair handbag mitten padlock robot snowman stapler "
    "sword telephone",
    "fruit": "lemon pineapple watermelon",
}
"""Objects of captions without such a form. None is a kind of another of its group, and all are singular."""
_COLOURS = "black|blue|brown|green|grey|pink|purple|red|white|yellow"
_COLOUR = re.compile(rf"\b({_COLOURS})\b(?! style)", re.IGNORECASE)  # "white style" names a deck of cards
_ALIKE = {"purple blue", "purple pink", "pink red", "red brown", "grey white", "grey black"}
"""Pairs of colours of which a picture may well show either."""
_TWO_COLOURED = re.compile(rf"\b({_COLOURS}) and ({_COLOURS})\b", re.IGNORECASE)


class Picture(NamedTuple):
    """One pair of the embedded data."""

    key: str
    jpeg: bytes
    captions: list[str]
    category: str


class Question(NamedTuple):
    """A picture, its caption, and a caption that is not its own."""

    picture: Picture
    negative: str


@dataclass(frozen=True)
class Part:
    """Words of a picture's caption that others of their group may take the place of."""

    picture: Picture
    group: str
    text: str
    rest: str
    """The caption with NUL instead of the part, wherever it occurs."""

    def question(self, text: str) -> Question | None:
        """With other words in the part's place; None where the result may be true or is no English."""
        old, new = self.text.casefold(), text.casefold()
        if old in new or new in old or {f"{old} {new}", f"{new} {old}"} & _ALIKE:  # "Add" icon and "Add folder" icon
            return None
        before = self.rest.partition("\0")[0].casefold()
        if before.endswith((" a ", " an ")) and (old[0] in "aeiou") != (new[0] in "aeiou"):
            return None
        first = text[0].upper() if self.text[0].isupper() else text[0].lower()
        negative = self.rest.replace("\0", first + text[1:])
        return Question(self.picture, negative) if is_false(negative, self.picture) else None


def is_false(negative: str, picture: Picture) -> bool:
    """Whether a caption says something that none of the picture's own captions says: it has a word that they lack."""
    return not words(negative) <= set().union(*map(words, picture.captions))


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def object_of(picture: Picture) -> Part | None:
    """The object in a picture's first caption, if it is of a kind that can be exchanged."""
    caption = picture.captions[0]
    for form, pattern in _FORMS.items():
        if match := re.fullmatch(pattern, caption):
            start, end = match.span("object")
            return Part(picture, f"{form} {picture.category}", match["object"], caption[:start] + "\0" + caption[end:])
    for group, nouns in _NOUNS.items():
        pattern = rf"\b({nouns.replace(' ', '|')})\b"
        found = re.findall(pattern, caption, re.IGNORECASE)
        if len(set(found)) == 1:
            return Part(picture, group, found[0], re.sub(pattern, "\0", caption, flags=re.IGNORECASE))
    return None


def attribute_of(picture: Picture) -> Part | None:
    """The only colour in a picture's first caption, else the style of an icon or the suit of a card."""
    caption = picture.captions[0]
    colours = _COLOUR.findall(caption)
    if len(colours) == 1:
        return Part(picture, "colour", colours[0], _COLOUR.sub("\0", caption))
    for form in ("icon", "card"):
        if match := re.fullmatch(_FORMS[form], caption):
            start, end = match.span("attribute")
            return Part(picture, form, match["attribute"], caption[:start] + "\0" + caption[end:])
    return None


def replacements(parts: Sequence[Part]) -> list[Question]:
    """One question for every part, with words of another part of its group, drawn by the picture's key."""
    texts = defaultdict(set)
    for part in parts:
        texts[part.group].add(part.text.casefold() if part.group in _NOUNS or part.group == "colour" else part.text)
    questions = []
    for part in parts:
        possible = [question for text in sorted(texts[part.group]) if (question := part.question(text))]
        if possible:
            questions.append(possible[_draw(part.picture.key) % len(possible)])
    return questions


def swaps(parts: Sequence[Part], others: dict[str, str]) -> list[Question]:
    """Two questions for every pair of parts that change places: of the same group, each picture in one pair at most.

    `others`: key of a picture -> the rest of what its caption names. It must differ within a pair, or the exchange
    would give one picture the other's caption.
    """
    taken: set[str] = set()
    questions = []
    ordered = sorted((part for part in parts if part.picture.key in others), key=lambda part: _draw(part.picture.key))
    for a, b in combinations(ordered, 2):
        keys = {a.picture.key, b.picture.key}
        if a.group != b.group or keys & taken or others[a.picture.key] == others[b.picture.key]:
            continue
        pair = (a.question(b.text), b.question(a.text))
        if pair[0] and pair[1]:
            taken |= keys
            questions += [pair[0], pair[1]]
    return questions


def exchanged_colours(pictures: Sequence[Picture]) -> Iterator[Question]:
    """Where a caption gives two things a colour each, the colours change places."""
    for picture in pictures:
        caption = picture.captions[0]
        colours = _COLOUR.findall(caption)
        if len(colours) != 2 or colours[0].casefold() == colours[1].casefold() or _TWO_COLOURED.search(caption):
            continue
        first, second = _COLOUR.finditer(caption)
        new = [b.lower() if a.islower() else b.capitalize() for a, b in (colours, colours[::-1])]
        middle = caption[first.end() : second.start()]
        yield Question(picture, caption[: first.start()] + new[0] + middle + new[1] + caption[second.end() :])


def make_questions(pictures: Sequence[Picture]) -> dict[str, list[Question]]:
    """Category -> questions; the same pictures give the same ones."""
    objects = [part for picture in pictures if (part := object_of(picture))]
    attributes = [part for picture in pictures if (part := attribute_of(picture))]
    object_texts = {part.picture.key: part.rest for part in attributes}
    attribute_texts = {part.picture.key: part.text.casefold() for part in attributes}
    return {
        "replace_att": replacements(attributes),
        "replace_obj": replacements(objects),
        "swap_att": [*swaps(attributes, object_texts), *exchanged_colours(pictures)],
        "swap_obj": swaps(objects, attribute_texts),
    }


def _draw(key: str) -> int:
    """A number that looks random and is the same everywhere."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
