"""Readable categories for the folders of the Open Clip Art Library."""

import re

_CATEGORIES: tuple[tuple[str, str], ...] = (
    ("animals/lucchetto", "clocks, furniture and containers"),
    ("animals/cymru_flag", "flags"),
    ("animals/tatoo", "symbols"),
    ("animals/tux_head", "birds"),
    ("animals/baby-tux", "birds"),
    ("animals/fish/kallisti", "symbols"),
    ("geography/shi_ken", "tools and weapons"),
    ("animals/birds", "birds"),
    ("animals/bugs", "insects"),
    ("animals/mammals", "mammals"),
    ("animals", "fish, reptiles and other animals"),
    ("buildings/furniture", "clocks, furniture and containers"),
    ("buildings", "buildings"),
    ("buttons", "buttons and lights"),
    ("computer/buttons", "buttons and lights"),
    ("computer/icons/flat-theme/applications", "application icons"),
    ("computer/icons/lemon-theme/apps", "application icons"),
    ("computer/icons/etiquette-theme/apps", "application icons"),
    ("computer/icons/applications", "application icons"),
    ("computer/icons/flat-theme/action", "action icons"),
    ("computer/icons/lemon-theme/actions", "action icons"),
    ("computer/icons/etiquette-theme/actions", "action icons"),
    ("computer/icons/lemon-theme/mimetypes", "file and folder icons"),
    ("computer/icons/etiquette-theme/gnome-mime", "file and folder icons"),
    ("computer/icons/lemon-theme/filesystems", "file and folder icons"),
    ("computer/icons/etiquette-theme/filesystems", "file and folder icons"),
    ("computer/icons/flat-theme/fi", "file and folder icons"),
    ("computer/icons/flat-theme/fo", "file and folder icons"),
    ("computer/folders", "file and folder icons"),
    ("computer/icons/flat-theme/device", "device icons"),
    ("computer/icons/lemon-theme/devices", "device icons"),
    ("computer/icons/etiquette-theme/devices", "device icons"),
    ("computer/icons", "application icons"),
    ("computer/bb_", "application icons"),
    ("computer", "computers"),
    ("containers", "clocks, furniture and containers"),
    ("decorations", "patterns and decorations"),
    ("education", "school and office"),
    ("electronics", "electronics"),
    ("food/beverages", "drinks"),
    ("food/desserts", "desserts"),
    ("food/fruit", "fruit and vegetables"),
    ("food/vegetables", "fruit and vegetables"),
    ("food", "meals and ingredients"),
    ("geography/astronomy", "weather, science and astronomy"),
    ("geography", "maps and geography"),
    ("logos", "symbols"),
    ("office", "school and office"),
    ("people/clothing", "clothing"),
    ("people/smilies", "smileys and stick figures"),
    ("people/stickmen", "smileys and stick figures"),
    ("people", "people"),
    ("plants", "plants"),
    ("recreation/games/cards", "playing cards"),
    ("recreation/music", "music"),
    ("recreation/sports", "sports"),
    ("recreation/holiday", "holidays and parties"),
    ("recreation/party", "holidays and parties"),
    ("recreation/religion", "holidays and parties"),
    ("recreation", "toys and games"),
    ("science", "weather, science and astronomy"),
    ("shapes/arrows", "arrows, shapes and speech bubbles"),
    ("shapes/jigsaw", "toys and games"),
    ("shapes", "arrows, shapes and speech bubbles"),
    ("signs_and_symbols/clocks", "clocks, furniture and containers"),
    ("signs_and_symbols/flags", "flags"),
    ("signs_and_symbols/led", "buttons and lights"),
    ("signs_and_symbols/map_symbols/aiga", "pictograms"),
    ("signs_and_symbols/map_symbols", "maps and geography"),
    ("signs_and_symbols/weather", "weather, science and astronomy"),
    ("signs_and_symbols", "symbols"),
    ("special/patterns", "patterns and decorations"),
    ("special", "miscellaneous"),
    ("tools/weapons", "tools and weapons"),
    ("tools", "tools and weapons"),
    ("transportation/roadsigns", "road signs"),
    ("transportation", "transportation"),
)
"""Start of the path -> category; the first match holds."""


_UNSORTED = (
    (r"bird|duck|penguin|seagull|ostrich|turkey", "birds"),
    (r"cows?|camel|elephant|cats?|lambs?|sheep|bulls", "mammals"),
    (r"bee", "insects"),
    (r"fish", "fish, reptiles and other animals"),
    (r"socks|dress|handbag|bow|backpack", "clothing"),
    (r"palette", "school and office"),
    (r"socks|dress|handbag|bow|backpack", "clothing"),
    (r"palette", "school and office"),
    (r"girl|boy|lady|princess|worker|mover|carpenter|painter|runner|woman|women|columbus|hiking|gardening"
     r"|weightlifting|hand sign|statue", "people"),
    (r"roses?|leaves|flower", "plants"),
    (r"ambulance|forklift|mixer|wheelbarrow|caterpillar", "transportation"),
    (r"igloo|skyscrapers|farm|apartment|skyline|gutter|pavement|steel beams", "buildings"),
    (r"sandwich|croissant|egg", "meals and ingredients"),
    (r"saw|chainsaw|tape measure|lamp|pliers|stepladder|locks?|iron|ironing", "tools and weapons"),
    (r"notepad|stapler|form|projector|graph|letter|manuals", "school and office"),
    (r"symbol|sign|logo|lauburu", "symbols"),
    (r"blood|test tubes?|stethoscope|eye test", "weather, science and astronomy"),
    (r"box|bottle|candle|soap|bowl|pacifier", "clocks, furniture and containers"),
    (r"festoons|garlands|angel", "holidays and parties"),
)  # fmt: skip
"""Word of the name -> category, for the folder of drawings that nobody had sorted."""


def category(path: str, name: str) -> str:
    """A readable class for the drawing at `path` that shows `name`.

    Raises ValueError for a folder that the table does not know.
    """
    if name.startswith("road sign:"):
        return "road signs"
    if name.startswith("map symbol:"):
        return "maps and geography"
    if name.startswith("flag of"):
        return "flags"
    if path.startswith("unsorted/"):
        words = ((re.search(rf"\b({pattern})\b", name, re.IGNORECASE), title) for pattern, title in _UNSORTED)
        return next((title for found, title in words if found), "miscellaneous")
    for start, title in _CATEGORIES:
        if path.startswith(start):
            return title
    raise ValueError(f"path: got {path!r}, expected one that starts with a known folder")
