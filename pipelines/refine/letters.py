"""How likely each pair of Latin letters is in human language, against random letters.

Made once from the Unicode CLDR names (territories, languages, currencies, units, months, time zones) of 36 languages
written in Latin script (Babel 2.18.0, Unicode licence), accents removed: the share of each pair in the distinct words
of a language, averaged over the languages. A digit d at row x, column y says that the pair xy is 2 ** (d - 6) times as
frequent there as among uniformly random letters (1/676), clipped to 0..9.
"""

import re
import unicodedata
from itertools import pairwise

CENTRE = 6
"""The digit that means: as frequent as in random letters."""

ODD_PAIR_BITS = -2
"""Bits for a letter next to a digit and for a small letter before a capital, both rare inside words (as `kq`, `vb`)."""

ALPHANUMERIC_RUN = re.compile("[A-Za-z0-9]+")

PAIR_DIGITS = {
    "a": "77785677868999674998766376",
    "b": "82327304711500700633714050",
    "c": "80337308715343700544610033",
    "d": "80158124842434830553603045",
    "e": "75667374757879552998665456",
    "f": "60005340600400620624500000",
    "g": "84137036724533700742734040",
    "h": "80117030823454730436603014",
    "i": "97878574677879764898664455",
    "j": "72236000623012620163600000",
    "k": "93317226934453830665745060",
    "l": "95358253945753830066743142",
    "m": "97428134820342860253623050",
    "n": "94688185955446831188643264",
    "o": "56665465557889662887675245",
    "p": "83407024711432750545610230",
    "q": "30001000200000302003600010",
    "r": "96578364926565822677744054",
    "s": "84728227849644752568745055",
    "t": "93528127924444800776732354",
    "u": "76566363646768451877554345",
    "v": "80137000710303600340300030",
    "w": "70106223502112400333200030",
    "x": "33004003400000200002100000",
    "y": "71445130434444530545420003",
    "z": "73116022723303500243501042",
}


def letter_bits(text: str) -> tuple[float, int]:
    """Return (mean bits per pair, number of pairs) over the Latin letters of `text`.

    Semantics: mean over adjacent pairs of log2(p_language / p_random). Language lies near +1, random letters near -2.
    Other scripts and pairs of digits are not judged; (0.0, 0) when no pair is.
    """
    decomposed = unicodedata.normalize("NFD", text)
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    bits = [_pair_bits(a, b) for a, b in _pairs(plain)]
    return (sum(bits) / len(bits), len(bits)) if bits else (0.0, 0)


def _pairs(text: str) -> list[tuple[str, str]]:
    runs = ALPHANUMERIC_RUN.findall(text)
    return [(a, b) for run in runs for a, b in pairwise(run) if not (a.isdigit() and b.isdigit())]


def _pair_bits(a: str, b: str) -> int:
    if a.isdigit() or b.isdigit() or (a.islower() and b.isupper()):
        return ODD_PAIR_BITS
    return int(PAIR_DIGITS[a.lower()][ord(b.lower()) - ord("a")]) - CENTRE
