r"""Penn Treebank tokens of a caption, as the published caption scores count them.

CIDEr, BLEU and ROUGE of COCO captions are figures about the tokens of one program: the Java `PTBTokenizer` of 2014,
called with `-preserveLines -lowerCase`, of whose output COCO's evaluation drops a list of marks (`DROPPED`). `words`
gives the same without Java. The rules have two origins: the treebank's public conventions (contractions are cut before
"n't" and "'s", brackets become "-LRB-", abbreviations keep their full stop, ...), and what the program printed for
probe strings; its source was not read. tests/test_ptb.py compares the two programs where a JRE is at hand.

Each rule is tried at a position of the text. The longest match is the next token, where what a rule only looks at
counts as matched; the first rule wins a tie. Two things that `words` drops anyway are not imitated: the second full
stop behind an abbreviation that ends a sentence, and whether a straight quote opens or closes.

Known to differ: a smiley or URL among further signs, and scripts that are written with combining vowel signs; captions
hold neither. A line break is a space here; there, the caller of the program would lose its place.
"""

import itertools
import re
import unicodedata

MARKS = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
DROPPED = frozenset(MARKS.split())
"""What COCO's evaluation drops. Brackets are not dropped: the program has lowered them to "-lrb-"."""

# ----------------------------------------------------------------------------------------------- words that are special

ALWAYS = """
    mr mrs ms dr drs prof profs st ste mt ft jr sr esq messrs mme mlle msgr ph wm jos alex
    gen col lt lieut sgt capt maj cpl pvt pfc sfc spc adm brig cmdr comdr ens insp det
    gov govs sen sens rep reps pres rev hon atty attys asst supt supts treas
    inc co cos corp ltd plc bhd bros cie assn assoc dept univ elec sys intl natl invt
    etc vs v x i est al cf seq adj adv tel ext bldg sq
    ave blvd rd rt ct
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    ala ariz calif colo conn dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo
"""
"""Abbreviations that keep their full stop, in capitals or not."""
NOT_SHOUTED = "mfg mtg pty ptys pte ptes"
"""Keep it unless all is capitals."""
NAMES = "ark az del ill la mass miss ore pa tex wash"
"""Keep it if they begin with a capital: "Miss." is a state, "miss." the end of a sentence."""
NUMBERED = "art ca fig figs no nos op pp prop"
"""Keep it before a number."""
OPENERS = """
    a after an as at but he her here however if in it last many more mr. now once one other our according she since so
    some such that the their then there these they this we what when while yet you
"""
"""Before these with a capital, a new sentence begins: a single letter ("plan B.") then gives up its full stop."""
IN_TWO = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3}
"""Words that are two, and the length of the first."""

# ------------------------------------------------------------------------------------------------ characters and rules

SPELT = {
    "\u00a2": " cents ", "\u00a3": "#", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$", "\x80": "$",
    "\u00bc": "\t1/4\t", "\u00bd": "\t1/2\t", "\u00be": "\t3/4\t", "\u2153": "\t1/3\t", "\u2154": "\t2/3\t",
    "\u2013": " -- ", "\u2014": " -- ", "\u2015": " -- ", "\x96": " -- ", "\x97": " -- ",
    "\u2026": " ... ", "\x85": " ... ",
    "\x91": "\u2018", "\x92": "\u2019", "\x93": "\u201c", "\x94": "\u201d", "\u00ad": "",
    "&amp;": "&", "&lt;": "\t<\t", "&gt;": "\t>\t", "&quot;": '"', "&apos;": "'", "&nbsp;": " ", "&mdash;": " -- ",
}  # fmt: skip
"""Characters and entities that are written otherwise before anything else looks at them."""
SIGNS = (
    "\u00a1\u00a5-\u00a9\u00ab\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bb\u00bf\u00d7\u00f7\u037e\u0387\u2016-\u2023"
    "\u2030-\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e\u2080-\u208e\u20a4\u2100\u2101\u2103-\u2106\u2108\u2109"
    "\u2114\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2155-\u215e"
    "\u2190-\u2bff\u3001\u3002\u3012\u30fb\u3200-\u33ff\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1"
    "\uffe5\uffe6"
)
"""Characters beyond ASCII that are tokens of their own; letters and digits are parts of words; all others vanish."""
PRINTED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''", " ": "\u00a0"}
"""How these are printed, alone or within a token."""
QUOTES = {
    "\u00ab": "``", "\u00bb": "''", "\u2018": "`", "\u2019": "'", "\u201a": "\u201a", "\u201b": "`",
    "\u201c": "``", "\u201d": "''", "\u201e": "\u201e", "\u2039": "`", "\u203a": "'",
}  # fmt: skip
"""Typographic quotes; a run of them is one token. Two single ones make what is printed for a double one."""

L = r"[^\x00-\x40\x5b-\x60\x7b-\xa0" + SIGNS + r"]"  # a letter of any script
A = L.replace(r"\x00-\x40", r"\x00-\x2f\x3a-\x40")  # or a digit
Q = "['\u2019]"  # an apostrophe
ENDINGS = "(?i:s|m|d|re|ve|ll)"
H = "[-_\u2010\u2011]"  # what joins words
W = "[A-Za-z0-9]+"
PART = rf"{W}(?:[-_][A-Za-z][A-Za-z0-9]*){{0,2}}"  # of a compound with slashes
INITIALS = r"[A-Za-z](?:\.[A-Za-z])+"


def _any(words: str) -> str:
    """Return a pattern for one of some words, in capitals or not."""
    return f"(?i:{'|'.join(map(re.escape, words.split()))})"


RULES = [
    # what is longer than a word
    r"<!--.*?-->|<[!?][A-Za-z][^<>\n]*>|</?[A-Za-z][A-Za-z0-9.:@_-]*(?:\s+[A-Za-z][\w-]*(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'))?)*\s*/?>",
    r"(?i:https?)://[^\s<>|()\"]+\.[^\s<>|()\"]*[^\s<>|()\".,!?-]",
    r"(?:[A-Za-z0-9]+\.)+(?:com|net|org|edu)/[^\s<>|()\"]+[^\s<>|()\".,!?-]",
    r"[A-Za-z0-9][^\s<>|()\"@\u201c-\u201f]*@[^\s<>|()\".]+(?:\.[^\s<>|()\".]+)*",
    r"@[A-Za-z_]\w*",
    rf"#{L}+",
    r"\(\d{3}\)[ \u00a0]?\d{3}[- \u00a0]?\d{3,4}",
    r"\d{2,3}[- \u00a0]\d{3}[- \u00a0]\d{4}",
    r"(?:\d+[- \u00a0])?\d+[/\u2044]\d+",
    # words
    *(rf"(?i:{word[:cut]})(?=(?P<ahead>(?i:{word[cut:]})(?![\w'\u2019])))" for word, cut in IN_TWO.items()),
    rf"{A}+(?:{H}{A}+)*",
    rf"{PART}(?:/{PART}){{1,2}}",
    rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-{W})+",
    rf"{L}{A}*(?:[.!?]{L}{A}*)+",
    rf"(?:{A}+(?:{H}{A}+)*|{L}{A}*(?:\.{L}{A}*)+|[A-Z]+(?:&[A-Z]+)+|[A-XZdlno]{Q}{L}{A}+)\.(?=(?P<ahead>[,;:]))",
    r"[A-Z]+(?:[&+][A-Z]+)+",
    r"[-+]?(?:\d*(?:[.,:]\d+)+|\d+)",
    # full stops that stay
    rf"{INITIALS}\.",
    rf"(?:{W}[.,])*(?:{W}-)+{INITIALS}\.(?:-{W})*|(?:{INITIALS}\.|[A-Za-z]+\.)(?:-{A}+)+",
    rf"[A-Za-z]\.(?!\s+(?=[A-Z]){_any(OPENERS)}\s)|(?i:ph\.d\.|cont'd\.)",
    rf"{_any(ALWAYS)}\.",
    rf"(?![A-Z]+\.){_any(NOT_SHOUTED)}\.",
    rf"(?=[A-Z]){_any(NAMES)}\.",
    rf"{_any(NUMBERED)}\.(?=(?P<ahead>[ \n\u00a0]?\d))",
    # apostrophes
    r"[A-Za-z]*[A-Za-mo-z](?=(?P<ahead>(?i:n['\u2018\u2019`]t)))",
    r"(?i:n['\u2018\u2019`]t)",
    r"(?i:'(?:s|m|d|re|ve|ll|n)(?![A-Za-z])|\u2019(?:s|m|d|re|ve|ll|n))",
    rf"{Q}(?i:em|till?|cause|n{Q})",
    rf"{Q}(?i:t)(?=(?P<ahead>(?i:is|was)))",
    rf"{Q}(?:[1-9]0[sS]|\d\d(?!\S))",
    rf"(?:{A}+-)*[A-XZdlno]{Q}(?!{ENDINGS}\b)(?:{L}{A}+|\d\d+)(?:-{A}+)*",
    rf"[A-Za-z]+[AEIOUYaeiouy]{Q}[AEIOUaeiou]{L}*|[A-Za-z]+[Oo]{Q}[A-Z][A-Za-z]+|(?i:c{Q}mon|s{Q}mores|nat{Q}l|e{Q}er)",
    rf"(?i:y){Q}(?={L})|(?i:[djl]{Q}(?!{ENDINGS}\b)|ol{Q})",
    r"(?i:anti|pro)-",
    # signs
    rf"[{''.join(QUOTES)}]{{1,2}}",
    r"[<>]?(?::|[;=](?!3))'?-?[()DPp\]\[|{@3dO](?![A-Za-z0-9])|[-^x=~<>'\u2019oOT]_[-^x=~<>'\u2019oOT]|([0ua])_\1",
    r"[A-Z]+\$",
    r"''|``|[!?]+|\*+|_+|#+|@+|<<|>>|-----+|-{2,4}|\.{3,5}|&#\d+;|(?i:c\+\+)",
    r"[^\s]",
]


COMPILED = [re.compile(rule) for rule in RULES]
PLAIN = re.compile(r"[a-z]+(?= )")
"""What needs no second look: a word that a space follows. Most of a caption is such words."""
ENTITY = re.compile("&[a-z]+;")
SIGN = re.compile(f"[{SIGNS}]")
NAMED = re.compile(r"[()\[\]{}\" ]")
QUOTED = re.compile(f"[{''.join(QUOTES)}]+")
LONG = re.compile(r"-{2,4}|\.{3,5}")
CUT = re.compile("['\u2019](?:s|m|d|re|ve|ll)|n['\u2018\u2019`]t")
"""Tokens whose apostrophe is written straight; within a word it stays as it is ("o\u2019clock")."""
APOSTROPHES = str.maketrans("\u2018\u2019", "`'")


def tokens(caption: str, following: str = "") -> list[str]:
    """Return the tokens of one caption in lower case, punctuation included.

    A number with a fraction ("1 1/2") or a telephone number is one token that holds no-break spaces.

    Args:
      following: What the program reads after the caption, in the same file. It matters to "plan B." and "no." alone.
    """
    text = _spelt(" ".join(caption.splitlines()))
    end, text = len(text), f"{text}\n{following}"
    found, at = [], 0
    while at < end:
        if text[at].isspace():
            at += 1
            continue
        match = PLAIN.match(text, at)
        if not match or match[0] in IN_TWO:
            match = max(filter(None, (rule.match(text, at) for rule in COMPILED)), key=_reach)
        found.append(_shown(match[0]))
        at = match.end()
    return found


def words(caption: str, following: str = "") -> str:
    """Return what is scored of a caption: its tokens without COCO's punctuation marks, one space between them."""
    return " ".join(token for token in tokens(caption, following) if token not in DROPPED)


def all_words(captions: list[str]) -> list[str]:
    """Return `words` of captions that the program would read from one file, line by line."""
    return [words(caption, following) for caption, following in itertools.pairwise([*captions, ""])]


def _reach(match: re.Match) -> int:
    """Return where a match ends, what it only looks at included. (`max` takes the first of the longest.)"""
    return max(match.end(), match.end("ahead") if "ahead" in match.re.groupindex else 0)


def _spelt(text: str) -> str:
    """Return a text of which every character is a letter, a digit, a sign or a space."""
    if "&" in text:
        text = ENTITY.sub(lambda match: SPELT.get(match[0], match[0]), text)
    return text if text.isascii() else "".join(map(_spelt_character, text))


def _spelt_character(character: str) -> str:
    if character in SPELT or character.isascii():
        return SPELT.get(character, character)
    if character > "\uffff":  # the program of 2014 knows no character beyond
        return " "
    if SIGN.match(character) or character in "\u2010\u2011\u00a0":
        return character
    mark = unicodedata.category(character)[0] == "M" and character < "\u1dc0"  # later: emoji's selectors, and such
    return character if character.isalnum() or mark else " "


def _shown(token: str) -> str:
    """Return a token as it is printed."""
    token = token.lower()
    if CUT.fullmatch(token):
        return token.translate(APOSTROPHES)
    if QUOTED.fullmatch(token):
        return "".join(QUOTES.get(character, character) for character in token)
    if LONG.fullmatch(token):
        return "--" if token[0] == "-" else "..."
    if token[0] == "<" or not NAMED.search(token):
        return token
    return NAMED.sub(lambda match: PRINTED[match[0]], token)
