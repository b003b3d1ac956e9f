"""Masks secrets before anything is written: values with telling names, passwords in URIs, tokens.

In doubt a value is masked: a value masked by mistake can be read from the command line, but a leaked
secret can cost an account. Every rule takes time linear in the length of the text.
"""

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise

import yaml

from runners.tracking.secret_names import announces_secret
from runners.tracking.secret_shapes import MASK, without_shapes

_QUOTE = r"\\{0,7}[\"']"  # in JSON within JSON, quotes are escaped
# Between a name and its value: `name: str = `, `"name": `, `["name"] = `, `"name", "` of a list of arguments,
# and `name: "name", value: ` of a list of settings.
_BETWEEN = (
    rf"(?:\\{{0,7}}[\"']?\]?(?:%22)?[ \t]{{0,8}}"
    r"(?::[ \t]{0,8}(?:str|bytes|SecretStr|str \| None)[ \t]{0,8}=|[:=]{1,2}>?|->|%3[AaDd])[ \t]{0,8}(?:%22)?"
    rf"|(?:{_QUOTE})?,?\s{{0,40}}(?:{_QUOTE})?(?<=[\s\"',])value(?:{_QUOTE})?[ \t]{{0,8}}[:=][ \t]{{0,8}}"
    rf"|{_QUOTE},\s{{0,40}}(?=[bru]?{_QUOTE}))"
)
_NAMED = re.compile(  # words without a separator are passed over within one match, and so is the last one
    rf"(?:[\w.\-]++(?!{_BETWEEN})|[^\w.\-]++)*+(?:(?P<name>[\w.\-]++)(?P<between>{_BETWEEN})|\Z)"
)
_OPTION = re.compile(
    r"(?<![^\s\"'(\[,])(?:--?|(?:setenv|setx|set[ \t]{1,4}-[A-Za-z]{1,4})[ \t]{1,8})"
    r"(?P<name>[A-Za-z][\w\-]*+)(?P<between>,?[ \t]++|\n[ \t]*+- )(?!-)(?=\S)"
)
_ELEMENT = re.compile(r"(<(?P<name>[\w.\-]++)(?:[ \t][^<>\n]{0,200})?>)(?=[^<\s])[^<]++")
_OPENED = re.compile(r"(?:[A-Za-z_][\w.]{0,39}\(|[bBrRuUfF$]{1,2})?(\\{0,7})([\"'])")
_BRACKET = {"(": ")", "[": "]", "{": "}"}
_BARE = re.compile(r"(?:[^\s\"'&]|[\"'](?=[A-Za-z0-9])|&(?!(?:amp;)?[\w.\-]{1,60}=))++")
_BEGINNING = re.compile(r"(?:[bru]?\\{0,7}[\"'])?(?P<word>[^\s\"'&]{0,100})")
_REST = re.compile(r"[^\n]*+")
_BLOCK = re.compile(r"(?:[|>][+\-\d]{0,2})?[ \t]{0,8}(?:\r?\n)(?P<indent>[ \t]{1,80}|(?=- ))(?=\S)")
_KEY = re.compile(r"(?:- )?[\"']?[\w.\-]{1,100}[\"']?:(?:\s|$)")
_LINE = re.compile(r"(?:^|\n)(?P<indent>[ \t]*+)(?:[+\-][ \t]*+)?[\"']?$")
_NUMBER = re.compile(r"[+\-]?[\d.,]++(?:e[+\-]?\d++)?[,;:]?")
_CALL = re.compile(r"[A-Za-z_][\w.]*+(?:\[|\((?![\"']))")  # `token = next(tokens)` in a diff
_NOTHING = re.compile(r"(?:None|null|[Tt]rue|[Ff]alse)(?![^\s,;)\]}\"'])")
_AGAIN = re.compile(r"(?:[ \t]{0,8}\|[ \t]{0,8}None)?[ \t]{0,8}=(?![=>])[ \t]{0,8}(?=\S)")
_STAND_IN = "0MASKED0"  # which no shell needs in quotes
_TELLING = re.compile(r"(?i)token|pass|pwd?|auth|secret|credential|creds|key|bearer|wort|webhook|sess|csrf")


def redacted_text(text: str) -> str:
    """`text` with users and passwords in URIs, assigned secrets, private keys and tokens masked."""
    text = without_shapes(text)
    if _TELLING.search(text) is None:
        return text
    if "</" in text:
        text = _ELEMENT.sub(
            lambda match: match[1] + MASK if announces_secret(match["name"]) else match[0], text
        )
    if "-" in text or "set" in text:
        text = _masked(text, _OPTION)
    return _masked(text, _NAMED)


def _masked(text: str, names: re.Pattern[str]) -> str:
    """`text` with the values behind secret names masked."""
    parts, end, place = [], 0, 0
    while (match := names.search(text, place)) is not None and match["name"] is not None:
        place = match.end()
        if announces_secret(match["name"]) and (stop := _values_end(text, match)) > place:
            parts += [text[end:place], MASK]
            end = place = stop
    return "".join(parts) + text[end:] if parts else text


def _values_end(text: str, match: re.Match[str]) -> int:
    """The end of the value behind a secret name, or its start if it is none.

    A type may stand before it: `token: Final = "x"`.
    """
    place, between, line = match.end(), match["between"], _line_before(text, match)
    is_word = match["name"].lower() in ("token", "pass", "auth")
    # Not `if token:` or `unit == "token":` in a diff.
    is_key = line is not None or (text[match.start("name") - 1] in "([{,\"'" and not is_word)
    if is_key and between.rstrip().endswith(":") and (block := _BLOCK.match(text, place)) is not None:
        return _lines_end(text, block.end() - len(block["indent"]), block["indent"], place)
    if _NOTHING.match(text, place) or (between == " = " and _CALL.match(text, place)):
        return place
    if is_word and (beginning := _BEGINNING.match(text, place)) is not None:
        word = beginning["word"]  # `nats per token: 3.2`, a list of columns
        is_secret = len(word) >= 6 and re.search(r"\d", word) is not None
        if _NUMBER.fullmatch(word) or ((between == ": " or "," in between) and not is_secret):
            return place
    stop = _value_end(text, place)
    while stop > place and (again := _AGAIN.match(text, stop)) is not None:
        stop = max(_value_end(text, again.end()), again.end())
    is_plain = stop > place and text[place] not in "([{" and not _OPENED.match(text, place)
    if is_plain and line is not None and between.endswith(" "):
        rest = _REST.match(text, stop)  # YAML: several words, on several lines if they are long
        assert rest is not None
        return _lines_end(text, rest.end() + 1, line["indent"] + " ", rest.end())
    return stop


def _line_before(text: str, match: re.Match[str]) -> re.Match[str] | None:
    """The beginning of the line in front of a name that a colon follows, if it holds nothing else."""
    start = max(0, match.start("name") - 80)
    line = _LINE.search(text[start : match.start("name")]) if ":" in match["between"] else None
    return line if line is not None and (start == 0 or line[0].startswith("\n")) else None


def _value_end(text: str, place: int) -> int:
    """The end of a value that begins at `place`: within quotes or brackets, or one word."""
    opened = _OPENED.match(text, place)
    if opened is not None:
        return _quoted_end(text, opened.end(), opened[2], len(opened[1]))
    if (closing := _BRACKET.get(text[place : place + 1])) is not None:
        inside = re.compile(rf"[^{re.escape(closing)}]{{0,4000}}+{re.escape(closing)}?").match(
            text, place + 1
        )
        assert inside is not None
        return inside.end()
    bare = _BARE.match(text, place)
    return place if bare is None else bare.end()


def _quoted_end(text: str, place: int, quote: str, escapes: int) -> int:
    """The end of a text in quotes, each escaped by `escapes` backslashes, or the end of the line."""
    while (end := re.compile(rf"[^{quote}\n]*+(?:{quote}|\Z)?").match(text, place)) is not None:
        place = end.end()
        if not end[0].endswith(quote):
            break
        before = len(end[0][:-1]) - len(end[0][:-1].rstrip("\\"))
        closes = before == escapes if escapes else before % 2 == 0
        if closes and not text.startswith(quote, place):
            break
        place += closes  # a doubled quote is one quote in YAML
    return place


def _lines_end(text: str, place: int, indent: str, otherwise: int) -> int:
    """The end of the indented lines from `place` on that are no keys of their own."""
    end = otherwise
    while (
        place < len(text)
        and text.startswith(indent or "- ", place)
        and not _KEY.match(text, place + len(indent))
    ):
        line = _REST.match(text, place)
        assert line is not None
        end, place = line.end(), line.end() + 1
    return end


def redacted(value: object) -> object:
    """`value` with every secret in its mappings, sequences and texts masked."""
    if isinstance(value, Mapping):
        # `{name: HF_TOKEN, value: x}`, also flattened to `env.0.name` and `env.0.value`.
        named = {
            f"{str(key).rpartition('name')[0]}value"
            for key, item in value.items()
            if re.fullmatch(r"(?:.*\.)?name", str(key)) and announces_secret(str(item))
        }
        return {
            redacted(key): MASK
            if (announces_secret(str(key)) or key in named)
            and not isinstance(item, bool)
            and item not in (None, "")
            else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return _redacted_items(value)
    return redacted_text(value) if isinstance(value, str) else value


def _redacted_items(items: Sequence[object]) -> list[object]:
    """The list masked item by item, also values that follow a telling name as argument or as pair."""
    masked = [redacted(item) for item in items]
    for place, (name, item) in enumerate(pairwise(items), start=1):
        names = isinstance(name, str) and (name.startswith("-") or (len(items) == 2 and place == 1))
        if names and "=" not in str(name) and announces_secret(str(name)) and isinstance(item, str) and item:
            masked[place] = MASK
    return masked


def redacted_yaml(text: str) -> str:
    """A YAML text with secrets masked by its structure, whatever its lines look like."""
    value = yaml.safe_load(text)
    masked = redacted(value)
    return text if masked == value else yaml.safe_dump(masked, sort_keys=False, allow_unicode=True)


def redacted_command(arguments: Sequence[str]) -> str:
    """Arguments for a shell, each masked before it is quoted."""
    masked = [str(item).replace(MASK, _STAND_IN) for item in _redacted_items(arguments)]
    return redacted_text(shlex.join(masked).replace(_STAND_IN, MASK))


class Masked(logging.Formatter):
    """Formats log records with secrets masked."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback if there is one."""
        return redacted_text(super().format(record))


def one_line(error: BaseException) -> str:
    """The type and message of `error` on one line, with secrets masked."""
    return redacted_text(" ".join(f"{type(error).__name__}: {error}".split())).rstrip(": ")
