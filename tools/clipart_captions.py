"""English captions and categories for the Open Clip Art Library.

The library's metadata are uneven: two thirds of its titles are those of a collection ("Lemon SVG
theme"), some are the author's name, and about 500 are Italian, French or Portuguese. So the name
of what a picture shows comes from the title where that is one, else from the file name, always
through `clipart_translations`; series with a system in their file names (playing cards, flags,
icon themes, map symbols) get a sentence that spells the system out.
"""

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass

from clipart_translations import ICONS, TITLES

MAX_CAPTION_WORDS = 36
MAX_KEYWORDS_IN_A_CAPTION = 6
MIN_KEYWORDS_ALONE = 3
"""Fewer ("symbol", "food, fruit") fit too many pictures to be a caption."""

_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Metadata:
    """What an SVG file of the library says about itself, as written there."""

    title: str
    description: str
    keywords: tuple[str, ...]
    creators: tuple[str, ...]
    licence: str = ""
    """URL of the licence, empty where the drawing names none."""


def read_metadata(svg: bytes) -> Metadata:
    """The RDF block of one drawing; fields that are missing are empty.

    Raises ValueError for bytes that are not XML or hold no `Work` element.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"SVG metadata: not well-formed XML: {error}") from error
    work = next((element for element in root.iter() if element.tag.endswith("}Work")), None)
    if work is None:
        raise ValueError("SVG metadata: no <Work> element, expected one in <metadata>")
    licence = next((element for element in work.iter() if element.tag.endswith("}license")), None)
    resource = {} if licence is None else licence.attrib
    return Metadata(
        title=(work.findtext(f"{_DC}title") or "").strip(),
        description=(work.findtext(f"{_DC}description") or "").strip(),
        keywords=tuple((item.text or "").strip() for item in work.iter(f"{_RDF}li")),
        creators=tuple((item.text or "").strip() for item in work.findall(f"{_DC}creator/*/{_DC}title")),
        licence=resource.get(f"{_RDF}resource", ""),
    )


# Names ------------------------------------------------------------------------------------------

_COLLECTION_TITLE = re.compile(
    r"clipart by nicu|diner menu|part of the|lemon svg theme|various cliparts|aiga_symbol|etiquette icons"
    r"|(svg )?road signs$|r1\d |australian maps|map symbols$|homes clipart|gold-theme|blueberry -"
    r"|sallite|card$|advertising$|simple arrows$|plastik-icon|balloons-aj|chess pieces"
    r"|pc connectors|moons$|svg gradient|gramastar|svg speech|nws government",
    re.IGNORECASE,
)
"""Titles that name the collection a file came in, not what it shows."""

_AUTHOR_IN_NAME = re.compile(
    r"\b(architetto\s+)?(francesco\s+)?rollandin(\s+francesco(\s+ar)?)?\b|\barchitetto francesco\b"
    r"|\bganson\d?\b|\bzazou\b|\bnicu buculei\b|\blinda kim\b|\baj$|\bmd( v0\.1)?$|\bv0\.1$|\bpeterm\b"
    r"|^clipart by [^-]+ - ",
    re.IGNORECASE,
)
_BLACK_AND_WHITE = re.compile(r"[\s,_]*\(b ?(and|&|/) ?w\)|(?<![a-z])b[&_ ]?w(?![a-z])[\s_]*|\(bw\)", re.IGNORECASE)
_TRAILING_NUMBER = re.compile(r"(?<=[a-zà-ÿ]{3})[\s_#-]*#?\d{1,3}[a-z]?$|[\s_#]+#?0\d*r?$|\s+v\d+$", re.I)
_NO_NAME = {
    "", "base", "2 2", "aktion", "unsorted", "cm", "fc", "various", "untitled", "pictures", "md5", "oh", "mr",
    "ms", "ec2.py", "psycho icecube", "as", "symbol", "x", "ppls", "blots",
}  # fmt: skip
_OPAQUE_PROGRAM = re.compile(
    r"amor|apollon|applixware|bzflag|cervisia|civworld|dia|dlgedit|flashkard|gabber|gkrellm|gnomemeeting|gnutella"
    r"|guarddog|gvim|gxmame|gxmessage|juk|kaboodle|kappfinder|karbon|karm|kate|kaudiocreator|kbabel|kbiff"
    r"|kcachegrind|kdevelop|kdiff|keduca|kenolaba|kexi|kfm|kfouleggs|kggz|kid|kig|kile|kinternet|kiosktool"
    r"|kmldonkey|kodo|kpovmodeler|ksame|ksirc|ksplash|kstreamripper|ktron|kugar|kvim|kvirc|kvoctrain|kwin|lbreakout"
    r"|logjam|mldonkey|nedit|noatun|nvu|openft|pcmcia|phppg|pysol|qtella|quanta|randr|sim|synaescope|tdsl|wp|xload"
    r"|amsn|anjuta|bluefish|clanbomber|kopete|kppp|krdc|kservices|ktip|netbean|pato|xine|xmule|sodipodi|kopeteaway"
)
"""Programs of 2004 whose names say nothing about their icons."""
_STEM_NAMES = {
    "head": "cartoon head", "buddy": "cartoon man", "ppl": "cartoon people", "home": "house",
    "baloon": "balloon", "sun": "sun", "nosmoke": "no smoking sign", "no": "prohibition sign",
    "xmas": "Christmas tree", "rubik": "Rubik's cube", "stappler": "stapler", "applf": "apple",
    "magnificator": "magnifying glass", "racked": "rack server", "lcd": "LCD monitor",
    "tower": "computer tower", "pinkhome": "pink house", "pinkhome-simple": "simple pink house",
    "baloon1": "balloon", "baloon2": "balloon", "cd": "CD", "tv": "TV", "usb": "USB",
    "svg globe": "globe", "svg globe blue": "blue globe", "svg globe green": "green globe",
    "farmer onelette": "farmer's omelette", "w cloud": "white cloud", "gift": "gift box",
    "dove symbol": "dove symbol", "smiley": "smiley face", "jigsaw": "jigsaw puzzle piece",
    "plastik icon": "plastic style icon", "hacker emblem": "hacker emblem of a glider",
}  # fmt: skip


def plain_name(text: str) -> str:
    """A title or file stem as words: no entities, authors, serial numbers or joined words."""
    text = html.unescape(html.unescape(text))
    if "Ã" in text:  # UTF-8 that was read as Latin-1 once
        text = text.encode("latin-1", "ignore").decode("utf-8", "ignore") or text
    text = re.sub(r" - (clothing|body part)$", "", text)
    text = re.sub(r"^(.+) - RPG map elements$", r"\1 drawn for a role-playing game map", text)
    text = re.sub(r"\((e-?mail|http)[^)]*\)|https?://\S+|\S+@\S+", " ", text)
    text = re.sub(r"(?<=[a-z]{3})(?=[A-Z][a-z])", " ", text.replace("_", " "))
    text = _AUTHOR_IN_NAME.sub(" ", text)
    text = _TRAILING_NUMBER.sub("", " ".join(text.split()))
    if re.fullmatch(r"[A-Za-z]{2,}(-[A-Za-z]{2,})+", text):  # a slug, unlike "t-shirt"
        text = text.replace("-", " ")
    return " ".join(text.split()).strip(" -,.:;")


def english_name(text: str) -> str:
    """`plain_name`, translated where it is known not to be English.

    "(B and W)" and the like become ", black and white" at the end. Empty for what names nothing.
    """
    text = html.unescape(html.unescape(text))
    black_and_white = _BLACK_AND_WHITE.search(text) is not None
    name = plain_name(_BLACK_AND_WHITE.sub(" ", text))
    key = name.casefold()
    name = TITLES.get(key) or TITLES.get(re.sub(r"\s*\d+$", "", key)) or name
    name = _STEM_NAMES.get(name.casefold(), name)
    if name.casefold() in _NO_NAME or not re.search(r"[A-Za-z]{2}|[A-Z]\d\d", name):
        return ""
    return f"{name}, black and white" if black_and_white else name


def is_junk_title(metadata: Metadata) -> bool:
    """Whether the title says nothing about the picture: empty, a collection's, or the author's."""
    title = metadata.title.strip()
    authors = {creator.casefold() for creator in metadata.creators}
    return not english_name(title) or _COLLECTION_TITLE.match(title) is not None or title.casefold() in authors


# Series whose file names follow a system --------------------------------------------------------

_SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
_RANKS = {"a": "ace", "j": "jack", "q": "queen", "k": "king", "2": "two", "3": "three",
          "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
          "10": "ten"}  # fmt: skip
_ROAD_SIGNS = {
    "bambi": "wild animals", "old folks": "elderly people", "evel knievel": "no motor vehicles",
    "kaboom": "no explosives", "splash": "quayside or river bank", "man w umbrella": "road works",
    "end daul": "end of dual carriageway", "grounded": "risk of grounding", "lorry length":
    "lorry length limit", "lorry limit": "lorry weight limit", "oneway": "one way", "humpback":
    "humpback bridge", "narrows": "road narrows", "narrows both": "road narrows on both sides",
    "junc curve": "junction on a bend", "pass either": "pass either side", "crosswind":
    "side winds", "zigzag": "zigzag bend", "motorway on": "start of motorway",
}  # fmt: skip
_CALLOUTS = {"cloud": "cloud-shaped thought bubble", "elips": "elliptic speech bubble",
             "rectg": "rectangular speech bubble", "rnd_rectg": "rounded rectangular speech bubble",
             "round": "round speech bubble", "segmented": "angular speech bubble",
             "stared": "star-shaped speech bubble"}  # fmt: skip


def _playing_card(match: re.Match[str]) -> str:
    style, suit, rank = match.groups()
    if suit == "jk":
        colour = {"b": "black", "r": "red"}.get(rank, rank)
        return f"{colour} joker playing card, {style} style"
    return f"{_RANKS[rank]} of {_SUITS[suit]} playing card, {style} style"


def _road_sign(match: re.Match[str]) -> str:
    name = plain_name(match["name"])
    return f"road sign: {_ROAD_SIGNS.get(name.casefold(), name.lower())}"


def _flag(match: re.Match[str]) -> str:
    name = plain_name(match["name"])
    name = re.sub(r"^(usa|uk|[a-z]+) (?=\w)", "", name) if match["country"] else name
    return f"flag of {name if any(c.isupper() for c in name) else name.title()}"


_SERIES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r".*/games/cards/(?P<style>bordered|ornamental|simple|white)/\w+_([cdhs]|jk)_(\w+)"),
     _playing_card),
    (re.compile(r".*/cardbacks/"), lambda m: "back of a playing card"),
    (re.compile(r".*/aiga_(?P<name>\w+?)(?P<twin>1|_)$"),
     lambda m: ("white on black pictogram: " if m["twin"] == "1" else "pictogram: ")
     + m["name"].replace("_", " ").replace("tickey", "ticket")),
    (re.compile(r".*/(?P<name>\w+?)_[01]_symbol_1"),
     lambda m: f"map symbol: {m['name'].replace('_', ' ')}"),
    (re.compile(r".*/jigsaw/jigsaw_(?P<colour>\w+?)_\d+"),
     lambda m: f"{m['colour']} jigsaw puzzle piece"),
    (re.compile(r".*/shapes/arrows/arrow[\d_-]+$|shapes/arrows/arrow[\d_-]+$"), lambda m: "arrow"),
    (re.compile(r".*/(?P<name>[a-z-]+)-(?P<kind>black|outline|shaded)$"),
     lambda m: f"map of {m['name'].replace('-', ' ').title()}, {m['kind']}"),
    (re.compile(r".*/australia-(?P<kind>outline|shading)-(?P<with>with|without)-boundaries"),
     lambda m: f"{m['kind']} map of Australia {m['with']} state boundaries"),
    (re.compile(r".*/contour_(?P<name>\w+)$"),
     lambda m: f"outline of a{'n' if m['name'][0] in 'aeiou' else ''} {m['name']}"),
    (re.compile(r".*/chesspieces-(?P<name>\w+)$"), lambda m: f"chess piece: {m['name']}"),
    (re.compile(r".*/moon-(?P<name>[a-z]+)\d?$"), lambda m: f"{m['name']} moon phase"),
    (re.compile(r".*/balloon-(?P<name>\w+)-aj$"), lambda m: f"{m['name']} balloon"),
    (re.compile(r".*/connector-(?P<name>[\w-]+)$"),
     lambda m: f"{m['name'].replace('-', ' ').replace('db', 'DB').replace('ps', 'PS')} connector"
     .replace("usb", "USB")),
    (re.compile(r".*/smilies/smiley\d+$"), lambda m: "smiley face"),
)  # fmt: skip
"""Path (without suffix) -> name, where a title is a collection's; the first match holds."""

_THEME = re.compile(
    r"computer/(icons/(?P<theme>flat|lemon|etiquette)-theme|buttons|icons|folders|diagrams"
    r"|hardware|connectors)?.*?/?(?P<stem>[^/]+)$"
)
_FLAG = re.compile(
    r".*/flags/(?!signalflag)(?!semaphore)(?:(?P<region>[a-z]+)/)?(?:(?P<country>[a-z_]+)/)?(?P<name>[^/]+)$"
)
_THEME_BY_TITLE = {"Lemon SVG theme": "lemon", "Etiquette Icons": "etiquette"}


def icon_name(stem: str) -> str:
    """What an icon called `stem` stands for, or its name as words if the table lacks it."""
    stem = re.sub(r"^\d{2,3}_", "", stem.replace("+", "_plus"))
    stem = re.sub(r"-$", "_minus", stem)
    for candidate in (stem.replace("_", " ").strip().casefold(), plain_name(stem).casefold()):
        if candidate in ICONS:
            return ICONS[candidate]
    if swapped := re.fullmatch(r"(folder|file|border|view)_(\w+?)(_open)?\d?", stem):
        thing, kind, is_open = swapped.groups()
        return f"{'open ' if is_open else ''}{kind.replace('_', ' ')} {thing}"
    if width := re.match(r"pen_width(\d+)$", stem):
        return f"pen width {width[1]}"
    return english_name(stem)


def subject(path: str, metadata: Metadata) -> str:
    """What the picture shows, in English words; empty where neither title nor file name tells.

    `path` is the drawing's path in the library without suffix, such as `animals/birds/hen_01`.
    """
    stem = path.rsplit("/", 1)[-1]
    theme = _THEME.match(path)
    if theme and theme["theme"]:
        style = theme["theme"]
        name = icon_name(stem)
        return f"{name} icon, {style} style" if name and not _OPAQUE_PROGRAM.fullmatch(name) else ""
    if match := re.search(r"signal flag (.+)|Semaphore Flag (.+)", metadata.title):
        flag, pose = match.groups()
        return f"maritime signal flag: {flag}" if flag else f"semaphore flag signal: {pose}"
    if metadata.title and metadata.title.casefold() in {creator.casefold() for creator in metadata.creators}:
        return ""  # the file name of such drawings is the author's name as well
    junk = is_junk_title(metadata)
    if junk:
        for pattern, name_of in _SERIES:
            if match := pattern.match(path):
                return name_of(match)
        callout, _, side = stem.rpartition("_")
        if "/callouts/" in path and (callout in _CALLOUTS or stem in _CALLOUTS):
            pointing = {"l": ", pointing left", "r": ", pointing right"}.get(side, "")
            return (_CALLOUTS.get(callout) or _CALLOUTS[stem]) + pointing
        if "road signs" in metadata.title.casefold():
            match = re.match(r"(?P<name>.*)", stem)
            assert match is not None
            return _road_sign(match)
        if metadata.title.startswith("blueberry"):
            return f"{icon_name(stem)} icon, blueberry style"
        if metadata.title in _THEME_BY_TITLE and path.startswith("computer/"):
            return f"{icon_name(stem)} icon, {_THEME_BY_TITLE[metadata.title]} style"
    if junk and metadata.title and not _COLLECTION_TITLE.match(metadata.title):
        return ""  # an odd title whose file name holds no more than title and author
    name = english_name(stem if junk else metadata.title)
    keywords = {word.casefold() for word in metadata.keywords if word}
    if path.startswith("geography/") and "map" in keywords and "map" not in name.casefold():
        return f"map of {name}"
    if re.match(r"signs_and_symbols/[^/]+$", path) and "flag" in keywords and name:
        return name if "flag" in name.casefold() else f"flag of {name}"
    if historic := re.match(r"historic\s*-\s*(.+)", name, re.IGNORECASE):
        return f"historic flag of {historic[1]}"
    is_flag = "flag" in keywords or not keywords
    if name and is_flag and (flag := _FLAG.match(path)) and "flag" not in name.casefold():
        return _flag(flag) if junk else f"flag of {name if name != name.lower() else name.title()}"
    return name


# Description, keywords, captions ------------------------------------------------------------------

_USELESS_DESCRIPTION = re.compile(
    r"inkscape|sodipodi|eps converted|@|public domain|contact|derivative|based on|data from"
    r"|submission|e-?mail|malformed|for luba|hash\(|derived|collection|copyright|uk roadsigns|rollandin|license"
    r"|\b(i|i'm|my|me|mine|we)\b"
    r"|semaphore flag signaling|ancient athenians|\bsvg\b|\blo que|\bdel?\b|\bdi\b|\bpour\b"
    r"|\b(é|um|uma|que|der|die|das|les|une|est|con|miasta|un|site web|este|fonte)\b"
    r"|\bpara\b|\bda\b|\bseus\b|enjoy|sauvetage|obligation|lutte|produit|gerenciador|simbolo",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(
    r"^(this is|here is|it's|its|an?)?\s*(an?|the)?\s*((nice|normal|standard|detailed|vectori[sz]ed|svg)\s+)*"
    r"(image|picture|shot|drawing|vectori[sz]ation|illustration)\s+of\s+|^this is (?=an? )",
    re.IGNORECASE,
)
"""What comes before the thing itself: "This is a nice detailed image of"."""
_KEYWORD_REPAIRS = {
    "vegitable": "vegetable", "mapsym": "map symbol", "weathersym": "weather", "musicsym": "music",
    "networksym": "network", "appicon": "", "roadsign": "road sign", "bodypart": "body part",
    "icecream": "ice cream", "unitedstates": "United States", "signalflag": "signal flag",
    "xmas": "Christmas", "noze": "nose", "imformation": "information", "northamerica":
    "North America", "latinamerica": "Latin America", "musicstuff": "music", "arrowshape": "arrow",
    "usholiday": "US holiday", "religholiday": "religious holiday", "roadtravel": "road travel",
    "airtravel": "air travel", "bullethole": "bullet hole", "stickmen": "stick figures",
    "mime-types": "file type", "mimetypes": "file type", "filesystem": "file system",
    "cartooon": "cartoon", "usmail": "US mail", "eiffeltower": "Eiffel tower", "pesce": "",
    "rana": "", "animali": "", "felini": "", "maison": "", "accueil": "", "architettura": "",
    "forbici": "", "pettine": "", "e": "", "and": "", "studio": "", "subnational": "region",
    "toothedwhale": "toothed whale", "united nations member": "", "signs and symbols": "",
    "lemon theme icon": "", "unsorted": "", "hash": "", "openclipart": "", "clipart": "",
    "theme": "", "icons": "icon", "11": "", "moon space": "space", "no": "", "vector": "",
    "special": "", "miscellany": "", "back": "", "stock": "", "protein": "protein food",
}  # fmt: skip


def clean_keywords(metadata: Metadata) -> list[str]:
    """The keywords that are English words, repaired, in their order, without repetition."""
    authors = " ".join(metadata.creators).casefold()
    kept: list[str] = []
    for raw in metadata.keywords:
        word = " ".join(html.unescape(html.unescape(raw)).replace("_", " ").split()).strip(" .,")
        word = _KEYWORD_REPAIRS.get(word.casefold(), word)
        junk = (
            not re.fullmatch(r"[A-Za-z][A-Za-z' -]+", word)
            or len(word) > 24
            or re.match(r"hash|0x|magick|.*(rollandin|openclip)", word, re.IGNORECASE)
            or word.casefold() in authors
            or max(map(len, word.split())) > 15
        )
        known = {form for other in kept for form in (other.casefold(), f"{other.casefold()}s")}
        if not junk and not {word.casefold(), f"{word.casefold()}s"} & known:
            kept.append(word)
    return kept


def clean_description(metadata: Metadata) -> str:
    """The first sentence of the description; empty if it is not about the picture or too long."""
    text = " ".join(html.unescape(html.unescape(metadata.description)).split())
    text = re.split(r"\s*(https?:|www\.)", _BLACK_AND_WHITE.sub("", text))[0]
    sentence = re.split(r"(?<=[a-z)])[.!?](\s|$)|\.\.+", text)[0].strip(" .,;:-")
    sentence = _LEAD_IN.sub("", sentence)
    words = sentence.split()
    if _USELESS_DESCRIPTION.search(sentence) or not 1 <= len(words) <= MAX_CAPTION_WORDS - 8:
        return ""
    if not re.match(r"[A-Z0-9a-z(\"']", sentence) or not re.search(r"[A-Za-z]{3}", sentence):
        return ""
    if any(ord(character) > 0x24F for character in sentence):
        return ""
    return sentence


def _fold(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.casefold()).strip()


def make_captions(name: str, metadata: Metadata) -> list[str]:
    """Distinct captions for a picture of `name`, the most descriptive first.

    Name with the description's first sentence (where that adds something), name alone, the
    description alone, name with keywords, keywords alone (if there are enough); each at most MAX_CAPTION_WORDS long.
    """
    description = clean_description(metadata)
    # Words of the name say nothing new when they come back as description or keyword.
    words = re.sub(r"\b(an?|the)\b", "", _fold(description)).split()
    if set(words) <= set(_fold(name).split()) or "".join(words) in _fold(name).replace(" ", ""):
        description = ""
    keywords = [word for word in clean_keywords(metadata) if _fold(word) not in _fold(name)]
    icon = re.match(r"(?P<what>.*) icon, (?P<style>\w+) style$", name)
    if icon:
        keywords = []  # those of the icon themes only say that it is an icon
    few = ", ".join(keywords[:MAX_KEYWORDS_IN_A_CAPTION])
    candidates = []
    if description:
        repeats_name = _fold(name) in _fold(description)
        candidates.append(description if repeats_name else f"{name}: {description}")
    candidates.append(name)
    if description:
        candidates.append(description)
    if icon:
        candidates.append(f"computer icon: {icon['what']}")
    if few:
        candidates.append(f"{name}, {few}")
    if len(keywords) >= MIN_KEYWORDS_ALONE:
        candidates.append(few)
    captions: list[str] = []
    for candidate in candidates:
        text = candidate[0].upper() + candidate[1:] if candidate is candidates[0] else candidate
        known = {_fold(caption) for caption in captions}
        if _fold(text) not in known and len(text.split()) <= MAX_CAPTION_WORDS:
            captions.append(text)
    return captions
