# SPDX-License-Identifier: GPL-2.0-or-later
"""Penn Treebank tokens in pure Python: what COCO's evaluation gets from Stanford's Java tokenizer, without Java.

pycocoevalcap tokenizes captions by the PTBTokenizer of CoreNLP 3.4.1 (``-preserveLines -lowerCase``). This module
gives the same tokens of the text that captions hold, so that a score does not depend on whether a machine has Java.
Its rules follow CoreNLP's lexer, which is under the GPL, and so is this file; it imports nothing of the suite, and the
suite works by Java without it.

It is a maximal munch scanner: at each place every rule is tried, the one that matches the longest text wins, and of
equally long ones the first. What follows a token (its context) counts as matched text and is not consumed. Python's
``re`` takes the first alternative that matches and not the longest, so longer alternatives come first.

Two habits of the original are kept since scores depend on them: letters and marks are those of Unicode 6 and anything
beyond the Basic Multilingual Plane is dropped (emoji), and all captions are one text, so a caption that ends in a
single letter and a full stop ("vitamin c.") loses that stop for certain first words of the *next* caption.

Marcus et al. 1993 (the Penn Treebank) and https://nlp.stanford.edu/software/tokenizer.html describe the conventions.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Code points by their behaviour inside and beside a word, found by running each of the plane through the original.
_MARKS = (  # continue a word though they are no letters in Unicode: combining marks and a few signs
    "00AD 02C2-02C5 02D2-02DF 02E5-02EB 02ED 02EF-036F 0375 0378-0379 0384-0385 03F6 0483-0487 055A-055F 0591-05BD "
    "05BF 05C1-05C2 05C4-05C5 05C7 0615-061A 064B-065E 0670 06D6-06E4 06E7-06ED 06FD-06FE 070F 0711 0730-074C "
    "07A6-07B0 07EB-07F3 0900-0903 093C 093E-094E 0951-0955 0962-0963 0981-0983 09BC 09BE-09C4 09C7-09C8 09CB-09CD "
    "09D7 09E2-09E3 0A01-0A03 0A3C 0A3E-0A4F 0A81-0A83 0ABC 0ABE-0ACF 0B82 0BBE-0BC2 0BC6-0BC8 0BCA-0BCD 0C01-0C03 "
    "0C3E-0C56 0D3E-0D44 0D46-0D48 0E31 0E34-0E3A 0E47-0E4E 0EB1 0EB4-0EBC 0EC8-0ECD 1885-1886"
)
_NEWER = (  # what became a letter or a digit in later versions of Unicode
    "037F 0528-052F 0560 0588 05EF 0860-088E 08A1 08AD-08C9 0978 0980 09FC 0AF9 0C34 0C5A-0C5D 0C80 0CDD 0D04 "
    "0D54-0D56 0D5F 0DE6-0DEF 0E86 0E89 0E8C 0E8E-0E93 0E98 0EA0 0EA8-0EA9 0EAC 13F5-13FD 16F1-16F8 170D 171F 1878 "
    "191D-191E 19B0-19C0 19C8-19C9 1B4C 1C80-1CBF 1CF2-1CF3 1CFA 2C2F 2C5F 312E-312F 31BB-31BF 4DB6-4DBF 9FCD-9FFF "
    "A698-A69D A78F A794-A79F A7AB-A7F7 A8FD-A8FE A9E0-A9E4 A9E6-A9FE AA7E-AA7F AB30-ABBF"
)
_SYMBOLS = (  # tokens of one character, wherever they occur
    "0025-0026 002B 005C 005E 007C 007E 00A5-00A9 00AC 00AE-00B4 00B6-00B9 00D7 00F7 0387 05BE 05C0 05C3 05C6 "
    "05F3-05F4 0600-0603 0606-060C 0614 061B 061E-061F 066A 066D 06D4 0700-070D 07F6-07F8 0964-0965 0E3F 0E4F 1FBD "
    "2016-2017 201A 201E-2023 2030-2038 203B 203E-2042 2044 2070 2074-207E 2080-208E 20A4 2100-2101 2103-2106 "
    "2108-2109 2114 2116-2118 211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F 2155-215E 2190-2BFF "
    "3001-3002 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1 FFE5-FFE6 037E 0589 00A1 00BF"
)

# Which words keep their full stop was found by running each through the original. In any case, but for capitals here.
_ABBREVIATIONS = """
    jan feb mar apr jun jul aug sept sep oct nov dec mon tues tue wed thurs thu fri
    ala ariz Az calif colo conn ct dak Del fla ga ind kans kan ky La md mich minn mo mont neb nev okla Pa penn tenn Tex
    va vt wisc wis wyo Ark Ill Mass Miss Ore Wash
    inc cos co corp pp?t[ye]s? ltd plc rt bancorp bhd assn univ intl sys tel est ext sq
    jr sr bros ph\\.d ed\\.d blvd rd esq etc al seq bldg
"""
_TITLES = """
    mrs mr ms drs dr profs prof sens sen reps rep attys atty lt col gen messrs govs gov adm rev maj sgt cpl pvt mt capt
    ste st ave pres lieut hon brig cmdr comdr pfc spc supts supt det adj adv asst assoc ens insp mlle mme msgr sfc
    ft dept ph vs alex wm jos cie cf treas invt elec natl m[tf]g
"""
_CUT_IN_TWO = "can-not gon-na wan-na got-ta lem-me gim-me"
_BEFORE_NUMBERS = "ca figs fig prop nos no art pp op"  # keep it only where a number follows
# Before these words the full stop after a single letter ends a sentence and is no part of the token.
_SENTENCE_STARTS = """
    About According Additionally After An As At A But Earlier However Here Her He If In It Last Many More Mr\\. Ms\\.
    Now Once One Other Our She Since Some So Such That Their These There Then They This The We When While What Yet You
"""


_Spell = Callable[[str], str]


class _Rule(NamedTuple):
    """A pattern whose group 1 is the token and the rest of whose match is context; and how the token is spelt."""

    pattern: re.Pattern[str]
    spell: _Spell | None  # None: the text is dropped


def tokenize(captions: Iterable[str]) -> list[list[str]]:
    """Return each caption's lower-case tokens, punctuation included.

    White space is normalised first, as it is for the Java tokenizer. A token may hold no-break spaces: "5 7/8" is one.
    """
    text = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    kinds = text.translate(_kinds())
    rows: list[list[str]] = [[]]
    position = 0
    while position < len(text):
        end = text.index("\n", position)
        at_start = position == 0 or text[position - 1] == "\n"
        if at_start and not _crossing().search(kinds[position:end]):
            rows[-1] = [token for chunk in text[position:end].split(" ") for token in _chunk(chunk)]
            rows.append([])
            position = end + 1
        else:
            end, spell = _next(kinds, position)
            first, *following = _spelt(text[position:end], spell).split("\n")  # the line end itself, or within a tag
            rows[-1].append(first)
            rows += [[rest] for rest in following]
            position = end
    return [[token for token in row if token] for row in rows[:-1]]


@functools.lru_cache(maxsize=1 << 16)  # captions share most of their words
def _chunk(chunk: str) -> tuple[str, ...]:
    """Return the tokens of text without white space that nothing outside it can change."""
    if _plain().fullmatch(chunk):
        return (chunk.rstrip(",.").lower(),)
    return tuple(_spelt(chunk[start:end], spell) for start, end, spell in _spans(chunk.translate(_kinds())))


@functools.lru_cache(maxsize=1 << 16)  # letters beyond ASCII have one kind: words in other scripts share most of these
def _spans(kinds: str) -> tuple[tuple[int, int, _Spell | None], ...]:
    """Return where the tokens of such a text start and end and how they are spelt."""
    spans: list[tuple[int, int, _Spell | None]] = []
    position = 0
    while position < len(kinds):
        end, spell = _next(kinds + "\n", position)
        spans.append((position, end, spell))
        position = end
    return tuple(spans)


def _next(kinds: str, position: int) -> tuple[int, _Spell | None]:
    """Return where the token at ``position`` ends and how it is spelt; None where its text is dropped."""
    longest, best, spell = position, None, None
    for pattern, spelling in _rules():
        match = pattern.match(kinds, position)
        if match and match.end() > longest:
            longest, best, spell = match.end(), match, spelling
    assert best is not None, "the last rule matches any character"
    return best.end(1), spell


def _spelt(text: str, spell: _Spell | None) -> str:
    return spell(text).lower() if spell else ""


# --------------------------------------------------------------------------------------------------------- the spelling


def _as_it_is(token: str) -> str:
    return token


def _no_soft_hyphens(token: str) -> str:
    return token.replace("\xad", "") or "-"


def _ampersands(token: str) -> str:
    return re.sub("&amp;", "&", token, flags=re.IGNORECASE)


def _no_spaces(token: str) -> str:
    return token.replace(" ", "\xa0")


def _brackets(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0")


def _quotes(token: str) -> str:
    return re.sub("&quot;|&apos;", lambda m: {"q": '"', "a": "'"}[m[0][1].lower()], token, flags=re.I).translate(_LATEX)


def _signs(token: str) -> str:
    return token.translate(_PLAIN)


def _constant(token: str) -> _Spell:
    return lambda _text: token


_LATEX = str.maketrans(
    {
        **dict.fromkeys("\x91‘‛‹", "`"),
        **dict.fromkeys("\x92’›", "'"),
        **dict.fromkeys("\x93“«", "``"),
        **dict.fromkeys("\x94”»", "''"),
        '"': "''",
    }
)
_PLAIN = str.maketrans(
    {
        "¢": "cents",
        "£": "#",
        **dict.fromkeys("\x80¤₠€", "$"),
        "¼": "1/4",
        "½": "1/2",
        "¾": "3/4",
        "⅓": "1/3",
        "⅔": "2/3",
    }
)

# ------------------------------------------------------------------------------------------------------------ the rules

# <name> is replaced by the part of that name. Letters match in any case inside (?i:...), and only as written elsewhere.
_PARTS = {
    "apos": "(?:['\x92’]|(?i:&apos;))",
    "inner_apos": "(?:['`\x91\x92‘’‛]|(?i:&apos;))",
    "word": "<letter><inner>*(?:[.!?]<letter><inner>*)*",
    "plain_word": "[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*",  # what n't may follow
    "reduced": "<apos>(?:(?i:re|ve|ll)|[msdMSD])",
    "not": "(?i:n<inner_apos>t)",
    "elision": "(?:[dDoOlL]<inner_apos><alnum>)?",  # d'Avignon, o'clock
    "number": "(?:<digit>*(?:[.:,\xad]<digit>+)+|<digit>+)",
    "acronym": r"(?:(?i:canada|sino|korean|eu|japan|non)-(?i:u\.s)|(?i:u\.s\.-u\.(?:s\.s\.r|k))"
    r"|[A-Za-z](?:\.[A-Za-z])+)",
    "slashed": "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}",
    "hyphen": "[-_\u058a\u2010\u2011]",
    "pause": "[,;:、]",
    "space": "[ \n]",
    "name": r"[A-Za-z][A-Za-z0-9_:.\-]*",
    "value": "(?:'[^']*'|\"[^\"]*\")",
    "tag": r"[<](?:[!?][A-Za-z\-][^>\n]*|/<name>|<name>(?: +<name>(?: *= *<value>)?)* */?) *>",
    "extension": "(?i:bat|bmp|cgi|class|cpp|c|dll|docx?|exe|gif|gz|html?|h|java|jar|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps"
    "|py|sql|tar|txt|wav|xml|x|zip)",
}
_GRAMMAR: list[tuple[str, _Spell | None]] = [  # of equally long matches the first wins
    (r"((?i:c\+\+|[cf]#))", _as_it_is),
    # "can not", "gon na", "'t is": the second half is read on its own
    *(("((?i:{}))(?i:{})".format(*word.split("-")), _as_it_is) for word in _CUT_IN_TWO.split()),
    ("('(?i:t))(?i:is|was)", _as_it_is),
    # markup
    ("(<tag>)", _no_spaces),
    ("((?i:&(?:md|mdash|ndash);)|[\x96\x97–—―])", _constant("--")),
    ("((?i:&amp;))", _constant("&")),
    ("((?i:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);))", _as_it_is),
    # words, with what is cut off them, and words that hold an apostrophe
    ("(<word>)<reduced>", _no_soft_hyphens),
    ("(<plain_word>)<not>", _no_soft_hyphens),
    ("(<word>)", _no_soft_hyphens),
    (
        "(<apos>(?i:n)<apos>?|[lLdDjJ]<apos>|(?i:dunkin|somethin|ol)<apos>|<apos>(?i:em|cause|till?)|<apos>[2-9]0(?i:s))",
        _as_it_is,
    ),
    ("([A-HJ-XZn]<inner_apos><alpha>{2,}|<alpha>+[aeiouyAEIOUY]<inner_apos>[aeiouA-Z]<alpha>*)", _as_it_is),
    (r"((?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o<inner_apos>o))", _as_it_is),
    ("((?i:y)<apos>)<alpha>", _as_it_is),
    # addresses
    (r'((?i:https?)://[^ \t\n\f\r"<>|(){}]+[^ \t\n\f\r"<>|.!?(){},\-])', _as_it_is),
    (
        r"""((?:(?i:www)\.(?:[^ \t\n\f\r"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"""
        r"""|(?:[^ \t\n\f\r"`'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu))"""
        r"""(?:/[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},\-])?)""",
        _as_it_is,
    ),
    (
        r'((?:(?i:&lt;)|<)?[a-zA-Z0-9][^ \t\n\f\r"<>|(){}]*@(?:[^ \t\n\f\r"<>|(){}.]+\.)*[^ \t\n\f\r"<>|(){}.]+'
        "(?:(?i:&gt;)|>)?)",
        _as_it_is,
    ),
    ("(@[a-zA-Z_][a-zA-Z_0-9]*|#<letter>+)", _as_it_is),
    # what was cut off a word
    ("(<reduced>)[^A-Za-z]", _quotes),
    ("(<not>)[^A-Za-z]?", _quotes),
    # numbers
    (r"(<digit>{1,2}[\-/]<digit>{1,2}[\-/]<digit>{2,4})", _as_it_is),
    (r"([\-+]?<number>)", _no_soft_hyphens),
    ("([⁺⁻₊₋]?(?:[⁰¹²³⁴⁵⁶⁷⁸⁹]+|[₀₁₂₃₄₅₆₇₈₉]+))", _as_it_is),
    (r"((?:<digit>{1,4}[\- ])?<digit>{1,4}(?:\\?/|⁄)<digit>{1,4})", _no_spaces),
    ("([¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", _signs),
    ("((?i:-[lr][rcs]b-|c\\.d\\.s|pro-|anti-|s(?:&amp;|&)(?:p-500|ls)|cap<apos>n|c<apos>est))", _ampersands),
    (r"(<slashed>(?:\\?/<slashed>){1,2})", _as_it_is),
    (r"([A-Z]*\$|#)", _as_it_is),
    ("([¢£¤¥\x80₠€؋฿₤￠￡￥￦])", _signs),
    # full stops that belong to a word
    (r"([A-Za-z])\.<space>+(?:<sentence_start>|<tag>)<space>", _as_it_is),
    (r"(<before_number>\.)<space>?<digit>", _as_it_is),
    (r"(<abbreviation>\.)[\s\S]{0,2}", _as_it_is),  # the two characters count as matched: "etc.o'clock" is cut here
    (r"(<acronym>\.|<title>\.|[A-Za-z]\.)", _as_it_is),
    ("(<acronym>)<space>", _as_it_is),
    ("(<apos>[0-9][0-9])<space>", _as_it_is),
    (r"(<inner>+(?:\.<inner>+)*\.<extension>)(?:<space>|[.?!,])", _as_it_is),
    (r"(<word>\.)<pause>", _no_soft_hyphens),
    # telephone numbers
    (
        r"((?:\([0-9]{2,3}\) ?|(?:\+\+?)?(?:[0-9]{2,4}[\- ])?[0-9]{2,4}[\- ])[0-9]{3,4}[\- ]?[0-9]{3,5}"
        r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5})",
        _brackets,
    ),
    # signs
    ('("|(?i:&quot;))', _quotes),
    ("([<]|(?i:&lt;))", _constant("<")),
    ("(>|(?i:&gt;))", _constant(">")),
    (r"([<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _brackets),
    (r"([\-\^x=~<>']_[\-\^x=~<>']|\([\-\^x=~<>'][_.]?[\-\^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\))", _brackets),
    (r"(\{)", _constant("-lcb-")),
    (r"(\})", _constant("-rcb-")),
    (r"(\[)", _constant("-lsb-")),
    (r"(\])", _constant("-rsb-")),
    (r"(\()", _constant("-lrb-")),
    (r"(\))", _constant("-rrb-")),
    (r"(-{5,}|-{1,2})", _as_it_is),
    (r"(-{3,4})", _constant("--")),
    (r"(\.{3,5}|(?:\. ){2,4}\.|…)", _constant("...")),
    (r"(@+|#+|_+|\*+|(?:\\\*){1,3})", _as_it_is),
    (r"(<pause>|[?!]+|[.=/])", _as_it_is),
    # compounds
    (r"([A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:<acronym>\.|[A-Za-z0-9\xad]+))+(?:\.(?=<pause>))?)", _no_soft_hyphens),
    (r"(<elision><alnum>+(?:<hyphen><elision><alnum>+)*(?:\.(?=<pause>))?)", _as_it_is),
    (r"([A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+(?:\.(?=<pause>))?)", _ampersands),
    # quotation marks that open, then all others
    (r"(')[A-Za-z][^ \n]", _constant("`")),
    ("(''|[`‘’‚‛“”„‟\x91\x92\x93\x94‹›«»]{1,2}|<apos>)", _quotes),
    ("(<reduced>)", _quotes),
    ("([<]{2}|>>)", _as_it_is),
    ("(<symbol>)", _as_it_is),
    ("(\n)", _as_it_is),
    # no token: the entity, spaces, control characters, and what Unicode 6 or the Basic Multilingual Plane does not have
    ("((?i:&nbsp;))", None),
    (r"([\s\S])", None),
]


@functools.lru_cache(maxsize=1)
def _crossing() -> re.Pattern[str]:
    """Return what makes a caption's chunks depend on each other or on the next caption.

    Tags, "1 1/2", "555 1234", ". . .", "no. 5"; and an end that could be a single letter or an abbreviation.
    """
    before_number = _any_case(_BEFORE_NUMBERS)
    return re.compile(rf"[<]|[\d)] \d|\. |(?:^|[^A-Za-z])(?:[A-Za-z]|{before_number})\.$|['`;‘’‛\x91\x92][^ ]*\.$")


@functools.lru_cache(maxsize=1)
def _plain() -> re.Pattern[str]:
    """Return what most chunks are and what needs no rules: a word, alone or before a comma or full stop."""
    cut = _CUT_IN_TWO.replace("-", "").replace(" ", "|")
    with_stop = "|".join(map(_any_case, (_ABBREVIATIONS, _TITLES, _BEFORE_NUMBERS)))
    return re.compile(rf"(?!(?i:{cut})\b)(?!(?:{with_stop})\.)[A-Za-z]{{2,}}[.,]?")


@functools.lru_cache(maxsize=1)
def _rules() -> list[_Rule]:
    """Compile the grammar."""
    entity = "(?i:&[aeiou](?:acute|grave|uml);)"
    symbols = "".join(char for char in _special() if ord(char) in _code_points(_SYMBOLS))
    parts = {
        **_PARTS,
        "alpha": f"[A-Za-z{_LETTER}]",
        "digit": f"[0-9{_DIGIT}]",
        "alnum": f"[A-Za-z0-9{_LETTER}{_DIGIT}]",
        "letter": f"(?:[A-Za-z{_LETTER}{_MARK}\xad]|{entity})",
        "inner": f"(?:[A-Za-z0-9{_LETTER}{_MARK}{_DIGIT}\xad]|{entity})",
        "symbol": rf"[%&+\\^|~{_SYMBOL}{symbols}]",
        "abbreviation": f"(?:{_any_case(_ABBREVIATIONS)})",
        "title": f"(?:{_any_case(_TITLES)})",
        "before_number": f"(?:{_any_case(_BEFORE_NUMBERS)})",
        "sentence_start": f"(?:{_any_case(_SENTENCE_STARTS)})",
    }

    def expanded(pattern: str) -> str:
        return re.sub("<([a-z_]+)>", lambda part: expanded(parts[part[1]]), pattern)

    return [_Rule(re.compile(expanded(pattern)), spell) for pattern, spell in _GRAMMAR]


def _any_case(words: str) -> str:
    """Return an alternation of ``words`` in any case; a word's own capital first letter must be one in the text."""
    return "|".join(f"{w[0]}(?i:{w[1:]})" if w[0].isupper() else f"(?i:{w})" for w in words.split())


# ------------------------------------------------------------------------------------------------------- the characters

# Rules are matched against text in which each character that no rule names is replaced by a representative of its kind.
_LETTER, _MARK, _DIGIT, _SYMBOL, _UNKNOWN = "ā", "\u0300", "\u0660", "§", "\0"


class _Kinds(dict[int, int]):
    """A table for ``str.translate`` that finds a character's kind when the character first occurs."""

    def __init__(self, special: set[str]) -> None:
        super().__init__((point, point) for point in [*range(128), *map(ord, special)])
        self.marks, self.newer, self.symbols = map(_code_points, (_MARKS, _NEWER, _SYMBOLS))

    def __missing__(self, point: int) -> int:
        category = unicodedata.category(chr(point))
        if point > 0xFFFF or point in self.newer:
            kind = _UNKNOWN
        elif category[0] == "L":
            kind = _LETTER
        elif category == "Nd" or 0x7C0 <= point <= 0x7C9:
            kind = _DIGIT
        else:
            kind = _MARK if point in self.marks else _SYMBOL if point in self.symbols else _UNKNOWN
        self[point] = ord(kind)
        return self[point]


@functools.lru_cache(maxsize=1)
def _kinds() -> _Kinds:
    return _Kinds(_special())


def _special() -> set[str]:
    """Return the characters beyond ASCII that a rule names."""
    patterns = [*_PARTS.values(), *(pattern for pattern, _ in _GRAMMAR)]
    return {char for pattern in patterns for char in pattern if not char.isascii()}


def _code_points(ranges: str) -> set[int]:
    points: set[int] = set()
    for span in ranges.split():
        first, _, last = span.partition("-")
        points.update(range(int(first, 16), int(last or first, 16) + 1))
    return points
