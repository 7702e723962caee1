"""Texts on which two libraries that implement one tokenizer would differ, if anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Characters per text where whole stretches of Unicode are probed.
_STRETCH_CHARACTERS = 64
# The planes of letters, of historic letters and emoji, of rarer ideographs (in part), of tags.
_STRETCHES = ((0, 0xD800), (0xE000, 0x10600), (0x1D000, 0x20200), (0xE0000, 0xE0200))

_BLANKS = (
    *("", " ", "  ", "   ", " " * 4, " " * 7, " " * 8, " " * 16, " " * 17, " " * 100),
    *("\n", "\n\n", "\n\n\n", "\n" * 20, "\t", "\t\t", "\t" * 9, "\r", "\r\n", "\r\n\r\n", "\n\r"),
    *(" \n", "\n ", " \n \n ", "a \n b", "a\t b", "a \tb", "a  b", "a   b ", " a", "a ", "  a  "),
    *("x\n", "\nx", "x\r\ny\r\nz", "  \n\n  x", "end.\n\n\nNext", "\v\f", "\x1c\x1d\x1e\x1f\x85"),
    *("\u00a0", "a\u00a0b", "\u2003\u2003", "\u3000x\u3000", "\u2028\u2029", "\u200b\ufeffx"),
    *("\ufefffirst", "a\x00b", "\x00", "\x00\x00\x00", "\x7f\x80\x9f"),
)
_WORDS = (
    *("I'm you're he'LL WE'VE it's 'tis o'clock 'S 'T", "don\u2019t I\u2019m", "''s 'd 'll're"),
    *("0 1 12 123 1234 12345 3.14159 1,000,000 1e-10 0x1F 007", "1" * 50, "\u0661\u0662\u0663"),
    *(
        "\u00bd \u2153 \u2167 \u2460 x\u00b2 H\u2082O",
        "CamelCaseAndHTTPRequest snake_case __init__",
    ),
    *(
        "(a)[b]{c}<d>",
        "...!!!???",
        "--- *** ### === ~~~",
        "a+b-c*d/e%f^g&h|i",
        "\\n\\t\\\\ \\u0041",
    ),
    *("https://example.org/a?b=c&d=%20#e", "me@example.org", "C:\\Users\\x", "$100 \u20ac5 50%"),
    *("if x==1:\n    return [y**2 for y in z]\n\telse:\n", "/* c */ // d\n#include <e.h>\n"),
    *("<0x41>", "<0x0A>", "<0xFF> <0xE2><0x96><0x81>", "\u2581", "a\u2581b", "\u2581\u2581 \u2581"),
    *("\u0120a \u010a \u0100", "##ing [UNK] [CLS]", "</w> @@"),
    *("ALL CAPS lower Title \u01c5 \u1e9e \u0130\u0131", "stra\u00dfe STRASSE"),
)
_SCRIPTS = (
    *("\u00e9 e\u0301 \u1e69 s\u0323\u0307 s\u0307\u0323", "\u212b \u00c5 A\u030a", "\ufb01\ufb02"),
    *("a\u0300\u0301\u0302\u0303\u0304b", "\u0301 lone mark", "o\u0338\u0301", "\u1eaf\u0328"),
    *("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8"),
    *("\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab", "\uff21\uff22\uff23\uff11\uff12 \uff76\uff9e"),
    *(
        "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
        "\u0393\u03b5\u03b9\u03ac \u03c2",
    ),
    *("\u0645\u0631\u062d\u0628\u0627 \u064b\u0651", "\u05e9\u05dc\u05d5\u05b9\u05dd"),
    *(
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0915\u094d\u200d\u0937",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14",
    ),
    *(
        "\U0001f642",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd",
        "\u2764\ufe0f",
    ),
    *("\U0001f1e9\U0001f1ea", "1\ufe0f\u20e3", "\U00020000\U0002f800", "\U0010fffd \ufffd \uffff"),
)


def probe_texts(delicate: Iterable[str]) -> Iterator[str]:
    """The fixed texts, all common characters, and texts around the given delicate ones."""
    yield from _BLANKS
    yield from _WORDS
    yield from _SCRIPTS
    yield from ("ab" * 300, "\u00e9" * 300, "\U0001f642" * 100, "x" * 1000, "-=" * 200)
    yield from (f"{letter}{mark}" for letter in "aeionsu \u03b1" for mark in "\u0300\u0308\u0327")
    for text in delicate:
        yield from (text, f"a{text}b", f" {text} ", f"{text}{text}\n{text}", text.swapcase())
    for begin, end in _STRETCHES:
        for start in range(begin, end, _STRETCH_CHARACTERS):
            # Without the space mark of SentencePiece, for which the whole stretch could be let off.
            codes = set(range(start, min(start + _STRETCH_CHARACTERS, end))) - {0x2581}
            characters = [chr(code) for code in sorted(codes)]
            yield "".join(characters)
            yield " ".join(characters[::8])
