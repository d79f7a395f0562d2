"""Languages as clients name them, by code or in English, and as the transcription prompt does: in English."""

from __future__ import annotations

from iolite.errors import UsageError

_NAMES = """
ar Arabic, bg Bulgarian, bn Bengali, ca Catalan, cs Czech, da Danish, de German, el Greek, en English, es Spanish,
et Estonian, fa Persian, fi Finnish, fr French, gu Gujarati, he Hebrew, hi Hindi, hr Croatian, hu Hungarian,
id Indonesian, is Icelandic, it Italian, ja Japanese, kn Kannada, ko Korean, lt Lithuanian, lv Latvian, ml Malayalam,
mr Marathi, ms Malay, nl Dutch, no Norwegian, pa Punjabi, pl Polish, pt Portuguese, ro Romanian, ru Russian, sk Slovak,
sl Slovenian, sr Serbian, sv Swedish, sw Swahili, ta Tamil, te Telugu, th Thai, tl Tagalog, tr Turkish, uk Ukrainian,
ur Urdu, vi Vietnamese, zh Chinese
"""
LANGUAGES = dict(entry.split() for entry in _NAMES.split(","))  # ISO 639-1 -> English


def language_named(asked: str | None) -> str:
    """The language's English name; English itself when none is asked for. UsageError for what is no language's name."""
    if not asked:
        return "English"
    name = LANGUAGES.get(asked.strip().lower().split("-")[0], asked.strip())
    if not name.replace(" ", "").isalpha() or len(name) == 2:
        raise UsageError("the language is not known", "give its ISO 639-1 code, such as de, or its name in English")
    return name.capitalize()
