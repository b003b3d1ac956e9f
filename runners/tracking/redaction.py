"""Masks secrets before anything is written: values with telling names, passwords in URIs, tokens.

In doubt a value is masked: a value masked by mistake can be read from the command line, but a leaked
secret can cost an account.
"""

import re
from collections.abc import Mapping
from itertools import pairwise

MASK = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = set("password passwd passphrase secret secrets credential credentials apikey".split())
_SECRET_KEYS = {"api", "access", "private"}  # ... followed by "key"
# Names of tokens of language models, which are not secret: `pad_token`, `next_token`.
_PLAIN_TOKENS = set("pad eos bos unk sep cls mask special first last next per each new".split())

_URI_USER = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.\-]*://)[^\s/]*@")
_TOKEN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|AKIA[A-Z0-9]{16}"
    r"|sk-(?:[a-z0-9]+-)*\w{20,}|(?<=[Bb]earer )[\w.\-]{16,})"
)
_ASSIGNMENT = re.compile(
    r"(?P<name>[\w.\-]*(?:token|passw(?:or)?d|passphrase|secret|credential|key)[\w.\-]*)"
    r"(?P<between>[\"']?\s*[:=]\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^\s\"'&]+)",
    re.IGNORECASE,
)


def announces_secret(name: str) -> bool:
    """Whether values of this name are masked: `hf_token` and `api_key`, not `pad_token`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if words[-1:] == ["token"] and not _PLAIN_TOKENS.intersection(words[-2:-1]):
        return True
    return not _SECRET_WORDS.isdisjoint(words) or any(
        first in _SECRET_KEYS and second in {"key", "keys"} for first, second in pairwise(words)
    )


def redacted_text(text: str) -> str:
    """`text` with users and passwords in URIs, assigned secrets and known kinds of tokens masked."""

    def mask(match: re.Match[str]) -> str:
        secret = announces_secret(match["name"])
        return match["name"] + match["between"] + MASK if secret else match[0]

    return _ASSIGNMENT.sub(mask, _TOKEN_SHAPES.sub(MASK, _URI_USER.sub(rf"\1{MASK}@", text)))


def redacted(value: object) -> object:
    """`value` with every secret in its mappings, sequences and texts masked."""
    if isinstance(value, Mapping):
        return {
            key: MASK
            if announces_secret(str(key)) and not isinstance(item, bool) and item not in (None, "")
            else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return redacted_text(value) if isinstance(value, str) else value


def one_line(error: BaseException) -> str:
    """The type and message of `error` on one line, with secrets masked."""
    return redacted_text(" ".join(f"{type(error).__name__}: {error}".split())).rstrip(": ")
