"""Penn Treebank tokens in pure Python: what COCO's evaluation gets from Stanford's Java tokenizer, without Java.

pycocoevalcap tokenizes captions by the PTBTokenizer of CoreNLP 3.4.1 (``-preserveLines -lowerCase``) and drops its list
of punctuation. This module does the same to the text that captions hold, so that a score does not depend on whether a
machine has Java. It is a maximal munch scanner: at each place every rule is tried, the one that matches the longest
text wins, and of equally long ones the first. What follows a token (its context) counts as matched text and is not
eaten. Python's ``re`` is greedy where the munch must be longest, so alternatives stand with the longer one first.

Two habits of the original are kept since scores depend on them: letters and marks are those of Unicode 6 and anything
beyond the Basic Multilingual Plane is dropped (emoji), and all captions are one text, so a caption that ends in a
single letter and a full stop ("vitamin c.") loses that stop for certain first words of the *next* caption.

Marcus et al. 1993 (the Penn Treebank) and https://nlp.stanford.edu/software/tokenizer.html describe the conventions.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

# What COCO's evaluation drops from the tokens; the upper-case ones never meet a lower-cased bracket, which so survives.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Code points by their behaviour inside and beside a word, found by running each one of the plane through the original.
_MARKS = (  # continue a word though Unicode calls them no letters: combining marks and a few signs
    "00AD 02C2-02C5 02D2-02DF 02E5-02EB 02ED 02EF-036F 0375 0378-0379 0384-0385 03F6 0483-0487 055A-055F 0591-05BD "
    "05BF 05C1-05C2 05C4-05C5 05C7 0615-061A 064B-065E 0670 06D6-06E4 06E7-06ED 06FD-06FE 070F 0711 0730-074C "
    "07A6-07B0 07EB-07F3 0900-0903 093C 093E-094E 0951-0955 0962-0963 0981-0983 09BC 09BE-09C4 09C7-09C8 09CB-09CD "
    "09D7 09E2-09E3 0A01-0A03 0A3C 0A3E-0A4F 0A81-0A83 0ABC 0ABE-0ACF 0B82 0BBE-0BC2 0BC6-0BC8 0BCA-0BCD 0C01-0C03 "
    "0C3E-0C56 0D3E-0D44 0D46-0D48 0E31 0E34-0E3A 0E47-0E4E 0EB1 0EB4-0EBC 0EC8-0ECD 1885-1886"
)
_NEWER = (  # letters that Unicode has since gained, or has since called letters
    "037F 0528-052F 0560 0588 05EF 0860-088E 08A1 08AD-08C9 0978 0980 09FC 0AF9 0C34 0C5A-0C5D 0C80 0CDD 0D04 "
    "0D54-0D56 0D5F 0E86 0E89 0E8C 0E8E-0E93 0E98 0EA0 0EA8-0EA9 0EAC 13F5-13FD 16F1-16F8 170D 171F 1878 191D-191E "
    "19B0-19C0 19C8-19C9 1B4C 1C80-1CBF 1CF2-1CFA 2C2F 2C5F 312E-312F 31BB-31BF 4DB6-4DBF 9FCD-9FFF A698-A69D A78F "
    "A794-A79F A7AB-A7F7 A8FD-A8FE A9E0-A9E4 A9E6-A9EF A9FA-A9FE AA7E-AA7F AB30-ABBF"
)
_SYMBOLS = (  # tokens of one character, wherever they stand
    "0025-0026 002B 005C 005E 007C 007E 00A5-00A9 00AC 00AE-00B4 00B6-00B9 00D7 00F7 0387 05BE 05C0 05C3 05C6 "
    "05F3-05F4 0600-0603 0606-060C 0614 061B 061E-061F 066A 066D 06D4 0700-070D 07F6-07F8 0964-0965 0E3F 0E4F 1FBD "
    "2016-2017 201A 201E-2023 2030-2038 203B 203E-2042 2044 2070 2074-207E 2080-208E 20A4 2100-2101 2103-2106 "
    "2108-2109 2114 2116-2118 211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F 2155-215E 2190-2BFF "
    "3001-3002 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1 FFE5-FFE6 037E 0589 00A1 00BF"
)

# Which words keep their full stop was found by asking the original about every candidate. Any case, unless capitals say.
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
_BEFORE_NUMBERS = "ca figs fig prop nos no art pp op"  # keep it only where a number follows
# Before these words the full stop of a single letter ends a sentence, and is then no part of the token.
_SENTENCE_STARTS = """
    About According Additionally After An As At A But Earlier However Here Her He If In It Last Many More Mr\\. Ms\\. Now
    Once One Other Our She Since Some So Such That Their These There Then They This The We When While What Yet You
"""


class _Rule(NamedTuple):
    """A pattern whose group 1 is the token, the rest of the match being context; and how the token is spelt."""

    pattern: re.Pattern[str]
    spell: Callable[[str], str] | None  # None: the text is dropped


def _code_points(ranges: str) -> set[int]:
    points: set[int] = set()
    for span in ranges.split():
        first, _, last = span.partition("-")
        points.update(range(int(first, 16), int(last or first, 16) + 1))
    return points


def _class(points: set[int]) -> str:
    """Return ``points`` as the inside of a regular expression's character class."""
    spans: list[list[int]] = []
    for point in sorted(points):
        if spans and spans[-1][1] == point - 1:
            spans[-1][1] = point
        else:
            spans.append([point, point])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in spans)


def _any_case(words: str) -> str:
    """Return an alternation of ``words`` in any case; a word's own capital first letter must be one in the text."""
    return "|".join(f"{w[0]}(?i:{w[1:]})" if w[0].isupper() else f"(?i:{w})" for w in words.split())


def _keep(token: str) -> str:
    return token


def _no_soft_hyphens(token: str) -> str:
    return token.replace("\xad", "") or "-"


def _ampersands(token: str) -> str:
    return re.sub("&amp;", "&", token, flags=re.IGNORECASE)


def _brackets(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0")


def _escaped_spaces(token: str) -> str:
    return re.sub("[ \r\n]", "\xa0", token)


_QUOTES = str.maketrans({**dict.fromkeys("\x91‘‛‹", "`"), **dict.fromkeys("\x92’›", "'"),
                         **dict.fromkeys("\x93“«", "``"), **dict.fromkeys("\x94”»", "''"), '"': "''"})  # fmt: skip


def _quotes(token: str) -> str:
    return re.sub("&apos;", "'", re.sub("&quot;", "''", token, flags=re.IGNORECASE), flags=re.IGNORECASE).translate(_QUOTES)


def _left_quotes(token: str) -> str:
    return _quotes(re.sub("'|&apos;", "`", re.sub('"|&quot;', "``", token, flags=re.IGNORECASE), flags=re.IGNORECASE))


_SIGNS = str.maketrans({"¢": "cents", "£": "#", **dict.fromkeys("\x80¤₠€", "$"),
                        "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"})  # fmt: skip


def _signs(token: str) -> str:
    return token.translate(_SIGNS)


def _constant(text: str) -> Callable[[str], str]:
    return lambda _token: text


@functools.lru_cache(maxsize=1)
def _rules() -> list[_Rule]:
    """Build the rules in their order of preference, for matches of the same length."""
    letters = {p for p in range(0xD800) if unicodedata.category(chr(p))[0] == "L"}
    letters |= {p for p in range(0xE000, 0x10000) if unicodedata.category(chr(p))[0] == "L"}
    letters -= _code_points(_NEWER)
    digits = {p for p in range(0x10000) if unicodedata.category(chr(p)) == "Nd"} | set(range(0x7C0, 0x7CA))
    alpha, d = _class(letters), f"[{_class(digits)}]"
    part = {
        "entity": "(?i:&[aeiou](?:acute|grave|uml);)",
        "alpha": f"[{alpha}]",
        "alnum": f"[{alpha}{_class(digits)}]",
        "d": d,
        "apos": "(?:['\x92’]|(?i:&apos;))",
        "apos_like": "(?:['\x92’\x91‘‛`]|(?i:&apos;))",
        "symbol": f"[{_class(_code_points(_SYMBOLS))}]",
    }
    part["letter"] = f"(?:[{_class(letters | _code_points(_MARKS))}]|{part['entity']})"
    part["inner"] = f"(?:[{_class(letters | digits | _code_points(_MARKS))}]|{part['entity']})"
    part["word"] = "{letter}{inner}*(?:[.!?]{letter}{inner}*)*".format(**part)
    part["acronym"] = "(?:(?i:canada|sino|korean|eu|japan|non)-(?i:u\\.s)|(?i:u\\.s\\.-u\\.(?:s\\.s\\.r|k))|[A-Za-z](?:\\.[A-Za-z])+)"
    part["elision"] = "(?:[dDoOlL]{apos_like}{alnum})?".format(**part)
    part["number"] = "(?:{d}*(?:[.:,\xad\u066b\u066c]{d}+)+|{d}+)".format(**part)
    part["reduced"] = "{apos}(?:(?i:re|ve|ll)|[msdMSD])".format(**part)
    part["slashed"] = "[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}"
    part["slashed"] = part["slashed"].format()
    part["abbreviation"] = f"(?:{_any_case(_ABBREVIATIONS)})"
    part["title"] = f"(?:{_any_case(_TITLES)})"
    part["before_number"] = f"(?:{_any_case(_BEFORE_NUMBERS)})"
    part["start"] = f"(?:{_any_case(_SENTENCE_STARTS)})"
    part["tag"] = (
        r"<(?:[!?][A-Za-z\-][^>\r\n]*|/[A-Za-z][A-Za-z0-9_:.\-]*|[A-Za-z][A-Za-z0-9_:.\-]*(?: +[A-Za-z][A-Za-z0-9_:.\-]*"
        r"(?: *= *(?:'[^']*'|\"[^\"]*\"))?)* */?) *>"
    )
    part["space"] = "[ \t\r\n\x0b\x0c\xa0]"
    return [_Rule(re.compile(pattern.format(**part)), spell) for pattern, spell in _GRAMMAR]


_GRAMMAR: list[tuple[str, Callable[[str], str] | None]] = [
    ("((?i:c\\+\\+|[cCfF]#))", _keep),
    ("((?i:can))(?i:not)", _keep),
    ("((?i:gon|wan))(?i:na)", _keep),
    ("((?i:got))(?i:ta)", _keep),
    ("((?i:lem|gim))(?i:me)", _keep),
    ("({apos}(?i:t))(?i:is|was)", _keep),
    ("({tag})", _escaped_spaces),
    ("((?i:&(?:md|mdash|ndash);)|[\x96\x97–—―])", _constant("--")),
    ("((?i:&amp;))", _constant("&")),
    ("((?i:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|\\#[0-9]+);))", _keep),
    ("({word}){reduced}", _no_soft_hyphens),
    ("([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*)(?i:n{apos_like}t)", _no_soft_hyphens),
    ("({word})", _no_soft_hyphens),
    ("({apos}(?i:n){apos}?|[lLdDjJ]{apos}|(?i:dunkin|somethin|ol){apos}|{apos}(?i:em|cause|till?)|{apos}[2-9]0(?i:s)"
     "|[A-HJ-XZn]{apos_like}{alpha}{{2,}}|{alpha}+[aeiouyAEIOUY]{apos_like}[aeiouA-Z]{alpha}*"
     "|(?i:cont'd\\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o{apos_like}o))", _keep),
    ("((?i:y){apos}){alpha}", _keep),
    (r"((?i:https?)://[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){{}},\-])", _keep),
    (r"((?:(?i:www)\.(?:[^ \t\n\f\r\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}"
     r"|(?:[^ \t\n\f\r\"`'<>|.!?(){{}},-_$]+\.)+(?i:com|net|org|edu))"
     r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){{}},\-])?)", _keep),
    (r"((?:(?i:&lt;)|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\xa0]*@(?:[^ \t\n\f\r\"<>|().\xa0]+\.)*[^ \t\n\f\r\"<>|().\xa0]+(?:(?i:&gt;)|>)?)", _keep),
    ("(@[a-zA-Z_][a-zA-Z_0-9]*|\\#{letter}+)", _keep),
    ("({reduced})[^A-Za-z]", _quotes),
    ("((?i:n{apos_like}t))(?:[^A-Za-z])?", _quotes),
    ("({d}{{1,2}}[\\-/]{d}{{1,2}}[\\-/]{d}{{2,4}})", _keep),
    ("([\\-+]?{number})", _no_soft_hyphens),
    ("([\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+))", _keep),
    ("((?:{d}{{1,4}}[- \xa0])?{d}{{1,4}}(?:\\\\?/|\u2044){d}{{1,4}})", _escaped_spaces),
    ("([\xbc\xbd\xbe\u2153-\u215e])", _signs),
    ("((?i:-[lr][rcs]b-|c\\.d\\.s|pro-|anti-|s(?:&amp;|&)(?:p-500|ls)|cap{apos}n|c{apos}est))", _ampersands),
    (r"({slashed}(?:\\?/{slashed}){{1,2}})", _keep),
    (r"([A-Z]*\$|\#)", _keep),
    ("([¢£¤¥\x80₠€؋฿₤￠￡￥￦])", _signs),
    (r"([A-Za-z])\.{space}+(?:{start}|{tag}){space}", _keep),
    (r"({before_number}\.){space}?{d}", _keep),
    (r"({abbreviation}\.)[\s\S]{{0,2}}", _keep),
    (r"({acronym}\.|{title}\.|[A-Za-z]\.)", _keep),
    ("({acronym}){space}", _keep),
    ("({apos}[0-9][0-9]){space}", _keep),
    (r"({word}\.)[,;:、]", _no_soft_hyphens),
    (r"((?:\([0-9]{{2,3}}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{{2,4}}[\- \xa0])?[0-9]{{2,4}}[\- \xa0])[0-9]{{3,4}}[\- \xa0]?[0-9]{{3,5}}"
     r"|(?:(?:\+\+?)?[0-9]{{2,4}}\.)?[0-9]{{2,4}}\.[0-9]{{3,4}}\.[0-9]{{3,5}})", _brackets),
    ("(\"|(?i:&quot;))[A-Za-z0-9$]", _left_quotes),
    ("(\"|(?i:&quot;))", _quotes),
    ("(<|(?i:&lt;))", _constant("<")),
    ("(>|(?i:&gt;))", _constant(">")),
    (r"([<>]?[:;=][\-o*']?[()DPdpO\\{{@|\[\]])[^A-Za-z0-9]", _brackets),
    (r"([\-\^x=~<>']_[\-\^x=~<>']|\([\-\^x=~<>'][_.]?[\-\^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\))", _brackets),
    (r"(\{{)", _constant("-lcb-")),
    (r"(\}})", _constant("-rcb-")),
    (r"(\[)", _constant("-lsb-")),
    (r"(\])", _constant("-rsb-")),
    (r"(\()", _constant("-lrb-")),
    (r"(\))", _constant("-rrb-")),
    ("(-{{5,}}|-{{1,2}})", _keep),
    ("(-{{3,4}})", _constant("--")),
    (r"(\.{{3,5}}|(?:\.[ \xa0]){{2,4}}\.|[\x85…])", _constant("...")),
    (r"(@+|\#+|_+|\*+|(?:\\\*){{1,3}})", _keep),
    (r"([,;:、]|[?!]+|[.=/])", _keep),
    (r"([A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:[A-Za-z0-9\xad]+|{acronym}\.))+(?:\.(?=[,;:、]))?)", _no_soft_hyphens),
    (r"({elision}{alnum}+(?:[-_\u058a\u2010\u2011]{elision}{alnum}+)*(?:\.(?=[,;:、]))?)", _keep),
    (r"([A-Z]+(?:(?:[+&]|(?i:&amp;))[A-Z]+)+(?:\.(?=[,;:、]))?)", _ampersands),
    (r"(')[A-Za-z][^ \t\r\n\xa0]", _left_quotes),
    ("(''|[`‘-‟\x91-\x94‹›«»]{{1,2}}|{apos})", _quotes),
    ("({reduced})", _quotes),
    ("(<<|>>)", _keep),
    ("({symbol})", _keep),
    ("(\n)", _keep),
    ("((?i:&nbsp;))", None),
    ("([\\s\\S])", None),
]


def scan(text: str, start: int = 0) -> Iterator[tuple[str, int]]:
    """Yield ``(token, where it ends)``."""
    position = start
    while position < len(text):
        longest, best, spell = position, None, None
        for pattern, spelling in _rules():
            match = pattern.match(text, position)
            if match and match.end() > longest:
                longest, best, spell = match.end(), match, spelling
        position = best.end(1)
        if spell:
            yield spell(best[1]).lower(), position
