r"""One way of writing for what LaTeX can write in many: answers as they stand in boxes become plain, comparable LaTeX.

What comes out of `clean` has no math delimiters, no spacing, size or font commands, words only inside `\text{...}`,
digits without separators, one command for each kind of fraction, and braces round every argument.
"""
# ruff: noqa: RUF001 -- signs that look like others are what this file is about

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ",
    "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ",
    "∅": r"\emptyset ", "°": r"^\circ ", "±": r"\pm ", "∓": r"\mp ", "∠": r"\angle ", "ℝ": r"\mathbb{R}",
    "¢": r"\text{ cents}", "’": "'", "′": "'", "“": '"', "”": '"', "。": ".",
}  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CURRENCIES = {r"\$": "dollars", "€": "euros", "£": "gbp", "¥": "yen", r"\pounds": "gbp"}


def word_set(text: str) -> frozenset[str]:
    """The words of `text`, which white space separates."""
    return frozenset(text.split())


# read as commands when they are typed without the backslash
_FUNCTIONS = word_set(
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln lg exp sqrt pi gcd lcm max min cis infinity inf"
)
_RENAMED = {"infinity": "infty", "inf": "infty"}
# words too short to be told from products of variables by their length
_SHORT_WORDS = word_set(
    "an the is are so no yes odd all one two six ten am pm not of in at per sq cu if to any out dne"
)


def _rules(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


def _commands(names: str) -> str:
    """A pattern for any of the commands, and for none that only begins like one."""
    return rf"\\(?:{names})(?![A-Za-z])"


_ARGUMENT = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # a braced group, three levels deep
_SHORT = r"[A-Za-z\d]"  # an argument without its braces

_LAYOUT = _rules(
    (r"\\\\\s*\[\s*-?[\d.]+\s*(?:ex|em|pt|cm|mm|in)\s*\]", r"\\\\ "),
    (r"\\+(?:boxed|fbox)\s*(?=\{)", ""),
    (_commands("left|right|middle|[bB]igg?[lrm]?") + r"\s*\.?", ""),
    (r"\\(?:phantom|hspace|vspace|color|textcolor|label|tag)\*?\s*\{[^{}]*\}", ""),
    (_commands("displaystyle|textstyle|limits|nolimits|checkmark|square|blacksquare|hfill|rm|bf|it"), ""),
    (_commands("tiny|small|normalsize|large|Large|LARGE|huge|Huge|mathopen|mathclose|mathrel|mathbin|mathord"), ""),
    (_commands("underline|ensuremath|overbrace|underbrace"), ""),
    (_commands("lbrace"), r"\\{"),
    (_commands("rbrace"), r"\\}"),
    (_commands("langle"), "("),
    (_commands("rangle"), ")"),
    (_commands("[lr]?vert|mid"), "|"),
    (r"\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{matrix}"),
    (r"\\end\{array\}", r"\\end{matrix}"),
    (r"\|\s*\\begin\{matrix\}(.*)\\end\{matrix\}\s*\|", r"\\begin{vmatrix}\1\\end{vmatrix}"),
    (r"\$\$?|\\\(|\\\)|\\\[|\\\]", " "),
    (r"(?<=\w)\*\*(?=[\w(])", "^"),
    (r"(?<=\d)\"", r"\\text{ inches}"),
    (r"\*\*|\"", ""),
    (r"\.\.\.+|" + _commands("[lc]?dots|dots[cb]"), r"\\ldots "),
    (r"(?<!\\)\{\s+", "{"),
    (r"(?<!\\)\s+\}", "}"),
)
_DIGIT_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,\s*\\!|\{,\}(?:\\!)?|\\[,;:! ]|\\thinspace\s?|~|_| )\d{3})+(?!\d)")
_COMMA_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_ORDINAL = r"\s*(?:st|nd|rd|th)\s*"
_NAMES = _rules(
    (r"\\!", ""),
    (r"(?<![A-Za-z])\{([,:])\}", r"\1"),
    (r"(?<!\\)\\[,;: \n]|~|" + _commands("thinspace|medspace|thickspace|enspace|quad|qquad"), " "),
    (_commands("[dtcsn]?frac|nicefrac"), r"\\frac"),
    (_commands("[dt]binom"), r"\\binom"),
    (r"<=|" + _commands("leqslant|leqq?"), r"\\le "),
    (r">=|" + _commands("geqslant|geqq?"), r"\\ge "),
    (_commands("lt"), "<"),
    (_commands("gt"), ">"),
    (r"!=|" + _commands("neq"), r"\\ne "),
    (r":=|" + _commands("coloneqq"), "="),
    (_commands("varnothing|O") + r"|\\\{\s*\\\}", r"\\emptyset"),
    (r"\{\}", ""),
    (_commands("backslash"), r"\\setminus"),
    (r"\\mathbb\s+([A-Z])", r"\\mathbb{\1}"),
    (r"(\\mathbb\{R\})\s*-\s*(?=\\\{)", r"\1\\setminus "),
    (_commands("bmod"), r"\\mod"),
    (_commands("lg"), r"\\log_{10}"),
    (r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}", r"\\\1(\2)"),
    (_commands("degrees?") + r"|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])", r"^\\circ "),
    (r"\^\s*\{?\s*(?:\\prime\s*)+\}?", "'"),
    (r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}", r"\\\1 "),
    (r"\\(?:text\w*|mbox|hbox|emph|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm)\s*(?=\{)", r"\\text"),
    (r"\\(?:math(?:rm|bf|it)|boldsymbol|bm)\s+([A-Za-z])", r"\1"),
    (rf"\\text\s*\{{\s*({'|'.join(sorted(_FUNCTIONS - {'min'}))})\s*\}}", r"\\\1 "),
    (r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=\d)", ":"),
    (r"(?i)(?<![A-Za-z])([ap])\.\s?m(?:\.|(?![A-Za-z]))", r"\1m"),
    (rf"(?<=\d)\s*\^\s*(?:\{{\s*)?\\text\s*\{{{_ORDINAL}\}}(?:\s*\}})?", ""),
    (rf"(?<=\d)\s*(?:\\text|\^)\s*\{{{_ORDINAL}\}}", ""),
)
_ARGUMENTS = _rules(
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"{\\frac{\1}{\2}}"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\^\s*\{?\s*(\d+)\s*\}?\s*/\s*_\s*\{?\s*(\d+)\s*\}?", r"\\frac{\1}{\2}"),
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),
    (rf"\\frac\s*({_SHORT})\s*({_SHORT})", r"\\frac{\1}{\2}"),
    (rf"\\frac\s*({_SHORT}|\\[A-Za-z]+)(?=\s*(?:\d|\{{))", r"\\frac{\1}"),
    (rf"\\frac\s*({_ARGUMENT})\s*({_SHORT}|\\[A-Za-z]+)", r"\\frac\1{\2}"),
    (rf"\\frac\s*({_ARGUMENT})\s*(?=\{{)", r"\\frac\1"),
    (rf"\\sqrt\s*(\[[^\[\]]*\])?\s*({_SHORT}|\\pi(?![A-Za-z]))", r"\\sqrt\1{\2}"),
    (r"\\sqrt\s*(\[[^\[\]]*\])?\s*\(([^()]*)\)", r"\\sqrt\1{\2}"),
    (r"\^\s*(-?(?:\d+|[A-Za-z]))", r"^{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\^\s*([+*])(?![\d.])", r"^{\1}"),
    (r"_\s*(\d+|[A-Za-z])", r"_{\1}"),
    (r"_\{\s*\(\s*(\d+)\s*\)\s*\}", r"_{\1}"),
    (r"\\(?:bar|overline|dot)\s*(\d)", r"\\overline{\1}"),
    (r"\.(\d*)\{(\\(?:bar|overline|dot)\{\d+\})\}", r".\1\2"),
)
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}(?:(\d*)\\(?:overline|dot)\{(\d)\})?|\((\d+)\))"
)
_ENDLESS = re.compile(r"(\d+)\.(\d*?)(\d+?)(?:\3{2,}|(?<=\d\d)\3)\s*\\ldots")
# 4th, but not 2st, which is a product
_COUNTED = re.compile(r"(\d*(?:1(?=st)|2(?=nd)|3(?=rd)|\d(?=th)))(?:st|nd|rd|th)(?![A-Za-z])")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_POWER_IN_TEXT = re.compile(r"\\text\s*\{([^{}]*)\^\{(-?\d+)\}([^{}]*)\}")
_TEXT_IN_TEXT = re.compile(r"\\text\s*\{([^{}]*)\\text\s*\{([^{}]*)\}")
_TEXT_BESIDE_TEXT = re.compile(r"\\text\{([^{}]*)\}\s*\\text\{([^{}]{2,})\}")
_ENVIRONMENT_OR_TEXT = re.compile(r"(\\text\{[^{}]*\}|\\(?:begin|end)\{\w+\*?\})")
_WORD = r"[^\W\d_]+(?:['-][^\W\d_]+)*"
_PROSE = re.compile(rf"(?<![\\\w]){_WORD}(?:\s+{_WORD})*")
_BARE_WORD = re.compile(r"(?<![A-Za-z\\{_^])(?:[A-Za-z]+(?:-[A-Za-z]{3,})*)(?![A-Za-z])")
_EDGES = re.compile(r"^(?:[\s,;:`]|\.(?![\d\\])|\\\\)+|(?:[\s.,;:`]|\\\\|\\$)+$")
_BRACKET = re.compile(r"\\?[{}]|[()\[\]]|\\.", re.DOTALL)


def clean(text: str) -> str:
    """The answer in the one way of writing; empty if there is nothing but punctuation."""
    text = (text if text.isascii() else _ascii(text)).replace("\t", " ").replace("\n", " ")
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # backslashes that were escaped once too often
    text = _trim(_apply(_LAYOUT, _money(text)))
    text = _DIGIT_GROUPS.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    text = _apply(_NAMES, text)
    if r"\begin" not in text:
        text = text.replace("&", "")
    text = _with_marked_words(text)
    text = _apply(_ARGUMENTS, f"{{{text}}}" if re.search(_commands("over|choose"), text) else text)
    return _trim(_ENDLESS.sub(_endless, _REPEATING.sub(_repeating, text)))


def join_comma_groups(text: str) -> str:
    """`1,234` as 1234; inside brackets only where a part as `000` could not be a number of its own."""

    def joined(match: re.Match[str]) -> str:
        before = text[: match.start()]
        inside = any(before.count(a) > before.count(b) for a, b in (("(", ")"), ("[", "]"), (r"\{", r"\}")))
        is_number = match.group()[0] != "0" and (not inside or has_leading_zero(match.group()))
        return match.group().replace(",", "") if is_number else match.group()

    return _COMMA_GROUPS.sub(joined, text)


def has_leading_zero(text: str) -> bool:
    """Whether a part behind a comma begins with 0, as that of a grouped number may and a number may not."""
    return re.search(r",0\d\d(?!\d)", text) is not None


def closing(text: str, start: int) -> int:
    r"""The index of the bracket that closes the one at `start`; -1 if none does.

    Of `(`, `[` and `\{` any may close any other, as in intervals; a brace that groups is closed by its own kind.
    """
    depth, counted = 0, "{}" if text[start] == "{" else r"()[]{}\{\}"
    for match in _BRACKET.finditer(text, start):
        bracket = match.group()[-1]
        if match.group() in counted:
            depth += (bracket in "{([") - (bracket in "})]")
        if depth == 0:
            return match.end() - 1
    return -1


def unbraced(text: str) -> str:
    """The text without braces round all of it, which only group."""
    text = text.strip()
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _apply(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _ascii(text: str) -> str:
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: f"^{{{m.group().translate(_RAISED)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m.group().translate(_LOWERED)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar_fraction, text)
    for sign, command in _SIGNS.items():
        text = text.replace(sign, command)
    return unicodedata.normalize("NFKC", text)


def _vulgar_fraction(match: re.Match[str]) -> str:
    return r"\frac{" + unicodedata.normalize("NFKC", match.group()).replace("⁄", "}{") + "}"


def _money(text: str) -> str:
    r"""`\$5` and `5\$` as `5\text{ dollars}`."""
    text = re.sub(r"\\(?:text\w*|mathrm)\s*\{\s*\\\$\s*\}|US\\\$", r"\\$", text)
    text = re.sub(r"\\(?:text\w*|mathrm)\s*\{\s*Rs\.?\s*\}\s*(?=\d)|(?<![A-Za-z])Rs\.?\s*(?=\d)", "", text)
    for sign, name in _CURRENCIES.items():
        if sign in text:
            sign, unit = re.escape(sign), rf"\\text{{ {name} }}"
            text = re.sub(rf"{sign}\s*(-?\.?\d(?:[\d.]|\{{,\}}|,\\!|,(?=\d{{3}})|\\,(?=\d))*)", rf"\1{unit}", text)
            text = re.sub(rf"(?<=[\d}}])\s*{sign}", unit, text)
            text = re.sub(sign, " ", text)
    return text


def _with_marked_words(text: str) -> str:
    r"""Words into `\text{...}`, and nothing but words; functions without their backslash get it."""
    text = _until_stable(_TEXT_IN_TEXT, r"\\text{\1\2", text)
    text = _until_stable(_POWER_IN_TEXT, r"\\text{\1}^{\2}\\text{\3}", text)
    text = _TEXT.sub(lambda m: " " + _PROSE.sub(r"\\text{\g<0>}", _COUNTED.sub(r"\1", m[1])) + " ", text)
    text = _until_stable(_TEXT_BESIDE_TEXT, r"\\text{\1 \2}", text)
    parts = _ENVIRONMENT_OR_TEXT.split(text)
    prose = (
        len(parts) > 1
        or any(map(_is_long_word, _BARE_WORD.findall(text)))
        or _BARE_WORD.fullmatch(text.strip(" .*'`")) is not None
    )
    if prose or _COUNTED.fullmatch(text.strip()):
        parts[::2] = [_COUNTED.sub(r"\1", part) for part in parts[::2]]
    parts[::2] = [_BARE_WORD.sub(lambda match: _marked(match, prose), part) for part in parts[::2]]
    return _until_stable(_TEXT_BESIDE_TEXT, r"\\text{\1 \2}", "".join(parts))


def _until_stable(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    while (changed := pattern.sub(replacement, text)) != text:
        text = changed
    return text


def _is_long_word(word: str) -> bool:
    return len(word) >= 4 and word not in _FUNCTIONS and re.search("[aeiouyAEIOUY]", word) is not None


def _marked(match: re.Match[str], prose: bool) -> str:
    """A bare word marked as text, if it is a word and no product; short words are only if others are or if it stands alone."""
    word, string = match.group(), match.string
    before, after = string[: match.start()], string[match.end() :][:1]
    if word in _FUNCTIONS and not (word == "min" and before.rstrip()[-1:].isdigit()):
        return f"\\{_RENAMED.get(word, word)} "
    spaced = before[-1:] in ("", *' ,("*') and after in ("", *' ,.:);"*')
    if word in ("and", "or") and before[-1:] == after == " ":
        return rf"\text{{{word}}}"
    is_word = _is_long_word(word) and (spaced or "-" in word)
    is_short_word = prose and spaced and len(word) > 1 and word.lower() in _SHORT_WORDS
    return rf"\text{{{word}}}" if is_word or is_short_word else word


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, block, more, end, bracketed = match.groups(default="")
    return _periodic(whole, fixed, block + more + end or bracketed)


def _endless(match: re.Match[str]) -> str:
    return _periodic(*match.groups())


def _periodic(whole: str, fixed: str, period: str) -> str:
    nines = 10 ** len(fixed) * (10 ** len(period) - 1)
    value = Fraction(int(whole + fixed + period) - int("0" + whole + fixed), nines)
    return rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"


def _trim(text: str) -> str:
    while True:
        shorter = unbraced(_EDGES.sub("", re.sub(r"\s+", " ", text).strip()))
        if shorter == text:
            return text
        text = shorter
