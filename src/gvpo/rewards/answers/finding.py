r"""Finding the final answer in a completion: one answer counts, the last one given.

In this order:
1. After the last `</think>`, and inside the last `<answer>...</answer>` unless a box or `####` comes after it.
2. The last `\boxed{...}` (or `\fbox`) or the line after the last `####`, whichever comes later. Boxes with nothing but
   commas, "and", "or" or labels such as `y =` between them are one answer, a list. A box that is never closed is none.
3. What follows the last "answer is", "answer:" and the like.
4. The last formula or number of the last 2,000 characters; a short completion as it is.

All is linear in the length of the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TAIL = 2_000  # characters that a search without markers looks at
BOXES = 50  # more of them are no answer to anything

_BOX = re.compile(
    r"""\\{1,2}(?:boxed|fbox)\s*\{
      | \\{1,2}(?:boxed|fbox)[ ]?(?P<bare>
            [-+]?[0-9]+(?:[.,][0-9]+)* | \\[dt]?frac[0-9]{2} | \\(?!f?box)[A-Za-z]+(?:\{[^{}]*\})* )
        (?= [.,;]?[ ]*(?:\$|\\\)|\\\]|\n|$) )  # \boxed7$, \boxed\frac12$
      | \\. | [{}]""",
    re.DOTALL | re.VERBOSE,
)
_GLUE = re.compile(
    r"""(?: [\s,;$&*] | \\[\\()\[\]] | \\q?quad | \\text\{\s*(?:and|or)\s*\}
          | (?<![A-Za-z])(?:and|or)(?![A-Za-z]) | [A-Za-z](?:_\{?\w\}?)?\s*[=:] )*""",
    re.VERBOSE,
)
_PHRASE = re.compile(r"answers?\b(?:[^\n.:=]{0,40}?\b(?:is|are)\b:?|\W{0,4}[:=])[\s:*]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=[\s*]|$)")
FORMULA = re.compile(r"\$\$([^$]{1,500})\$\$|\$([^$\n]{1,500})\$|\\\[(.{1,500}?)\\\]|\\\((.{1,500}?)\\\)", re.DOTALL)
_JOINT = re.compile(r"\s*(?:,|,?\s*(?:and|or)(?![A-Za-z]))\s*")
_TEXT = re.compile(r"\\(?:text[a-z]*|mbox|mathrm)\s*\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{4,}")
# Possessive: digits can be taken apart in many ways, and there is no end to trying them where the whole does not fit.
_RUN = re.compile(
    r"""(?: [0-9]++(?:[.,][0-9]++)*+ | \.(?=[0-9]) | \\[A-Za-z]+ | \\[{}%$] | ,(?=\s?[-+0-9(\\$])
          | [-\u2212+*/^_=<>(){}\[\]|!%$\u20ac\u00a3\u00b0\u221a\u03c0\u221e\u00d7\u00b7\u00f7\u00b1\u2264\u2265\u00bd ]
          | (?<![A-Za-z])(?:sqrt|pi|sin|cos|tan|log|ln|and|or|[A-Za-z])(?![A-Za-z'\u2019]) )++""",
    re.VERBOSE,
)
_EDGE_WORDS = re.compile(r"^\s*(?:(?:and|or)(?![A-Za-z])|[aAI] )|(?<![A-Za-z\\])(?:and|or)\s*$")
_EDGES = " ,;:=+*/^_<>-\u2212\n"


@dataclass(frozen=True, slots=True)
class Box:
    """A closed box: where it starts and ends in the text, and what is in it."""

    start: int
    end: int
    content: str


def final_answers(text: str) -> list[str]:
    r"""What counts as the completion's final answer, the best reading first; empty where there is none.

    A second reading is there where several boxes are apart: all of them, as one list. It can only be right for an
    answer that is a list of exactly as many values.
    """
    text, tagged = _without_frame(text)
    boxes, open_box = read_boxes(text)
    hashes = text.rfind("####")
    if hashes > max(open_box, boxes[-1].end if boxes else -1):
        return _some(text[hashes + len("####") :].strip().partition("\n")[0])
    if open_box >= 0:
        return []
    if boxes:
        every = _joined(boxes) if len(boxes) <= BOXES else ""
        return list(dict.fromkeys(_some(_joined(_last_run(boxes, text))) + _some(every)))
    return _some(_after_phrase(text) or (text if tagged and not _prose(text) else _last_expression(text)))


def _some(answer: str) -> list[str]:
    answer = answer.strip()
    return [answer] if answer else []


def _without_frame(text: str) -> tuple[str, bool]:
    """The text after the reasoning, and inside the answer tags; and whether there were such tags."""
    text = text.rpartition("</think>")[2]
    start = text.rfind("<answer>")
    if start < 0:
        return text, False
    inner, _, after = text[start + len("<answer>") :].partition("</answer>")
    return (text, False) if "\\boxed" in after or "####" in after else (inner, True)


# Boxes


def read_boxes(text: str) -> tuple[list[Box], int]:
    """The closed boxes that are in no other closed box; and where a later box opens that never closes, else -1."""
    if "boxed" not in text and "fbox" not in text:
        return [], -1
    found: list[tuple[int, int, slice]] = []  # start, end and content, which is cut out once the outermost are known
    opened: list[re.Match[str]] = []
    for match in _BOX.finditer(text):
        token = match[0]
        if match["bare"]:
            found.append((match.start(), match.end(), slice(*match.span("bare"))))
        elif token[-1] == "{" and token != "\\{":
            opened.append(match)
        elif token == "}" and opened:
            opening = opened.pop()
            if len(opening[0]) > 1:
                while found and found[-1][0] > opening.start():
                    found.pop()
                found.append((opening.start(), match.end(), slice(opening.end(), match.start())))
    boxes = [Box(start, end, text[content]) for start, end, content in found]
    unclosed = [match.start() for match in opened if len(match[0]) > 1]
    last = boxes[-1].end if boxes else -1
    return boxes, unclosed[-1] if unclosed and unclosed[-1] >= last else -1


def _last_run(boxes: list[Box], text: str) -> list[Box]:
    """The last box, and those before it that only commas and the like stand between."""
    first = len(boxes) - 1
    while first and _is_glue(text[boxes[first - 1].end : boxes[first].start]):
        first -= 1
    return boxes[first:]


def _is_glue(between: str) -> bool:
    return len(between) <= 60 and _GLUE.fullmatch(between) is not None


def _joined(boxes: list[Box]) -> str:
    return ", ".join(dict.fromkeys(box.content.strip() for box in boxes))


# Prose


def _after_phrase(text: str) -> str:
    """What follows the last "answer is" with something mathematical after it, else the last one with anything."""
    ends = [match.end() for match in _PHRASE.finditer(text)][-5:]
    stated = [_stated(text[end : end + TAIL]) for end in reversed(ends)]
    mathematical = [answer for answer in stated if re.search(r"[0-9\\]", answer)]
    return next(iter(mathematical or filter(None, stated)), "")


def _stated(tail: str) -> str:
    if formulas := _formulas(tail):
        return formulas
    clause = _SENTENCE_END.split(tail, maxsplit=1)[0].strip(" *\"'`")
    run = _RUN.match(clause)
    leading = _trimmed(clause, run) if run else ""
    if leading and (_is_mathematical(leading) or (run and run.end() == len(clause))):
        return leading
    if choice := re.match(r"\([A-Z]\)|[A-Z](?=[,;:]|$)", clause):
        return choice[0]
    if re.search("[0-9]", clause):
        return _last_expression(clause)
    return re.split(r"[,;(]| because | since | as ", clause, maxsplit=1)[0][:100]


def _formulas(tail: str) -> str:
    """The formulas that the text begins with, commas and "and"s between them."""
    found: list[str] = []
    position = 0
    while len(found) < BOXES and (match := FORMULA.match(tail, position)) and _is_formula(_inside(match)):
        found.append(_inside(match))
        joint = _JOINT.match(tail, match.end())
        if not joint:
            break
        position = joint.end()
    return ", ".join(found)


def _inside(formula: re.Match[str]) -> str:
    return formula[formula.lastindex or 0].strip()


def _is_formula(content: str) -> bool:
    """Whether there is mathematics between the signs, and not what stands between two sums in dollars."""
    return not _prose(content) and content[-1:] not in tuple("+-*/=(")


def _last_expression(text: str) -> str:
    text = text.strip()
    if len(text) <= 100 and "\n" not in text and (not _prose(text) or _is_phrase(text)):
        return text.rstrip(".") if _RUN.fullmatch(text.rstrip(".")) or _is_phrase(text) else _last_run_of_math(text)
    tail = text[-TAIL:]
    formula = None
    for match in FORMULA.finditer(tail):
        if _is_formula(_inside(match)):
            formula = match
    after = _last_run_of_math(tail[formula.end() :] if formula else tail)
    return after or (_inside(formula) if formula else "")


def _last_run_of_math(text: str) -> str:
    runs = [run for match in _RUN.finditer(text) if _is_mathematical(run := _trimmed(text, match))]
    if not runs:
        return ""
    before, _, last = runs[-1].rpartition("=")
    return last.strip(" $") if re.search("[0-9]", before) else runs[-1]  # 9 * 2 = 18, but x = 18


def _trimmed(text: str, run: re.Match[str]) -> str:
    """The run without what belongs to the prose around it: articles, hyphens, commas, half a pair of brackets."""
    found = run[0]
    if run.start() and text[run.start() - 1].isalnum():
        found = found.lstrip("-\u2212")
    if text[run.end() : run.end() + 1].isalpha() or text[run.end() : run.end() + 1] in ("&", "'", "\u2019"):
        found = re.sub(r"(?<!\s)\s++[A-Za-z]?\s*+$", "", found)
    found = _EDGE_WORDS.sub("", found).rstrip(_EDGES + "([").lstrip(" ,;:=*/^_<>+")
    for opening, closing in (("([", ")]"), ("{", "}")):
        opened, closed = (sum(map(found.count, signs)) for signs in (opening, closing))
        if found.startswith(tuple(opening)) and opened > closed:
            found = found[1:]
        if found.endswith(tuple(closing)) and closed > opened:
            found = found[:-1]
    return found.strip(" ,;$")


def _is_mathematical(text: str) -> bool:
    return re.search(r"[0-9]|\\[A-Za-z]|[\u03c0\u221e\u00bd]", text) is not None


def _prose(text: str) -> bool:
    r"""Whether the text has words of four letters and more in it, other than in `\text{}`."""
    return any(word.lower() not in ("sqrt", "infinity") for word in _WORD.findall(_TEXT.sub("", text[:TAIL])))


def _is_phrase(text: str) -> bool:
    return len(text.split()) <= 3 and not any(character.isdigit() for character in text)
