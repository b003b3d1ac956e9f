"""Masks secrets before anything is written: values with telling names, passwords in URIs, tokens.

In doubt a value is masked: a value masked by mistake can be read from the command line, but a leaked
secret can cost an account. Every rule takes time linear in the length of the text.
"""

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise

MASK = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = set(
    "secret secrets credential credentials apikey apitoken authtoken accesstoken hftoken passcode passwort"
    " accesskey accountkey authkey privatekey secretkey".split()
)
_SECRET_ENDS = ("password", "passwords", "passwd", "passphrase")  # PGPASSWORD is one word
_SECRET_KEYS = {"api", "access", "private", "account", "encryption", "signing", "subscription"}  # key
# Names of tokens of language models, which are not secret: `pad_token`, `next_token`.
_PLAIN_TOKENS = set("pad eos bos unk sep cls mask special first last next per each new".split())
_ACCOUNTS = set(
    "db database my mysql pg postgres sql redis mongo smtp ftp mail email user admin root".split()
)
_ALONE = {"pass", "auth", "pw"}  # secret if they are the whole name
_PLACES = {"file", "path", "dir", "directory", "yaml", "yml", "txt", "py", "length"}

# Each rule starts where no longer word could: tried at every place within a word, it would take quadratic
# time. Repetitions are possessive (++) or bounded for the same reason.
_BETWEEN = (
    r"\\?[\"']?[ \t]{0,8}(?::[ \t]{0,8}(?:str|bytes|SecretStr|str \| None)[ \t]{0,8}=|[:=]{1,2}>?)[ \t]{0,8}"
)
_NAMED = re.compile(  # words without a separator are passed over within one match, and so is the last one
    rf"(?:[\w.\-]++(?!{_BETWEEN})|[^\w.\-]++)*+(?:(?P<name>[\w.\-]++)(?P<between>{_BETWEEN})|\Z)"
)
_VALUE = re.compile(
    r"\\?\"(?:[^\"\\\n]|\\[^\"\n])*+\\?\"|\\?'(?:[^'\\\n]|\\[^'\n])*+\\?'|[^\s\"'&][^\s\"'&]*+"
)
_NUMBER = re.compile(r"[+\-]?[\d.,]++(?:e[+\-]?\d++)?[,;:]?")
_CALL = re.compile(r"[A-Za-z_][\w.]*+[(\[]")  # `token = next(tokens)` in a diff
_OPTION = re.compile(r"(?<![^\s\"'(])(?:--|setenv[ \t]{1,8})(?P<name>[A-Za-z][\w\-]*+)[ \t]++(?!-)(?=\S)")
_BEGIN_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-----")
_KEY_BODY = re.compile(
    r"(?:\s|\\n)*+(?:(?:Proc-Type|DEK-Info|Version|Comment): [\w ,.\-]*+(?:\s|\\n)*+)*+[A-Za-z0-9+/=\s\\]*+"
)
_USER = re.compile(r"[^\s\"'<>`/]*+")
_PASSWORD = re.compile(r"[^\s\"'<>`/:@]*+:(?!\d+[/?#])[^\s\"'<>`]*+")
_ANY_PASSWORD = re.compile(_PASSWORD.pattern.replace(r"(?!\d+[/?#])", ""))
_OF_PAGES = ("http", "https", "ftp", "sftp", "file", "s3", "gs", "hdfs", "ssh", "git")
_HOST = re.compile(r"[\w\-]+[.:/]|localhost|$")

_AUTHORIZATION = re.compile(
    r"(?i)(authorization\\?[\"']?\s{0,4}[:=]\s{0,4}\\?[\"']?"
    r"(?:(?:basic|bearer|token|digest|negotiate)[ \t]{1,4})?)(?=[^\s\"'\\]{6})[^\s\"'\\]++"
)
_BEARER = re.compile(r"(?i)((?<!\w)bearer )[\w.\-~+/=]{16,}+")
_COOKIE = re.compile(r"((?<!\w)(?:[Ss]et-)?[Cc]ookie\\?[\"']?: {0,4})[^\s\"'\\][^\n\"'\\]*+")
_QUERY = re.compile(
    r"(?i)([?&](?:x-amz-|x-goog-)?(?:sig|signature|security-token|credential|key|code)=)[^&\s\"'\\]++"
)
_LOGIN = re.compile(r"((?<!\S)(?:-u|--(?:proxy-)?user)[ =][^\s:=/]{1,100}+:)(?=\S)[^\s\"']++")
_PROGRAM = re.compile(  # options of one letter, which mean a password for these programs
    r"((?<!\w)(?:mysql|mysqldump|mysqladmin|mariadb|sshpass|sqlcmd)(?:[ \t]++(?!-[pP])\S{1,100}+){0,8}[ \t]++"
    r"-(?:p ?|P ))(?=\S)[^\s\"']++"
)
_NETRC = re.compile(r"((?<!\w)login\s{1,8}[^\s]{1,100}+\s{1,8}password\s{1,8})\S++")
_HOOK = re.compile(
    r"((?:hooks\.slack\.com/(?:services|workflows)|discord(?:app)?\.com/api/webhooks)/)[^\s\"'<>]++"
)
_JWT = re.compile(r"(?<![\w\-])eyJ[\w\-]{8,}+\.[\w\-]{8,}+(?:\.[\w\-]*+){0,3}")
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?=[hgxArsynpSdln])(?:hf_[A-Za-z0-9]{30,}+|gh[oprsu]_[A-Za-z0-9]{30,}+"
    r"|github_pat_\w{22,}+|gl(?:pat|ptt|dt|rt|cbt|ft|imt|agent|oas|soat)-[\w\-]{14,}+"
    r"|xox[a-z]-[A-Za-z0-9\-]{10,}+|xapp-[\w\-]{20,}+|AIza[\w\-]{30,}+"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"
    r"|sk-(?:ant|proj|svcacct|admin|or)-[\w\-]{20,}+|(?<!-)sk-(?:[a-z0-9]{1,20}-){0,4}(?=\w{0,40}\d)\w{20,}+[\w\-]*+"
    r"|[rs]k_(?:live|test)_\w{16,}+|ya29\.[\w\-]{20,}+|npm_[A-Za-z0-9]{30,}+|pypi-[\w\-]{50,}+"
    r"|SG\.[\w\-]{16,}+\.[\w\-]{16,}+|AGE-SECRET-KEY-1[A-Z0-9]{20,}+"
    r"|dapi[a-f0-9]{32}|hv[sb]\.[\w\-]{20,}+|do[por]_v1_[a-f0-9]{40,}+|ATATT3[\w\-=]{20,}+|lin_api_\w{30,}+"
    r"|gsk_\w{30,}+|xai-\w{30,}+|nvapi-[\w\-]{30,}+|r8_\w{30,}+)"
)
_SHAPES = (
    *("hf_", "gh", "github_pat_", "gl", "xox", "xapp-", "AIza", "AKIA", "ASIA", "sk-", "sk_", "rk_"),
    *("ya29.", "npm_", "pypi-", "SG.", "AGE-SECRET-KEY-", "dapi", "hvs.", "hvb.", "_v1_", "ATATT3"),
    *("lin_api_", "gsk_", "xai-", "nvapi-", "r8_"),
)
# What makes it worthwhile to try a rule, the rule, and what takes the secret's place.
_RULES = [
    (("uthorization", "UTHORIZATION"), _AUTHORIZATION, rf"\1{MASK}"),
    (("earer ", "EARER "), _BEARER, rf"\1{MASK}"),
    (("ookie",), _COOKIE, rf"\1{MASK}"),
    (("=",), _QUERY, rf"\1{MASK}"),
    (("-u", "user"), _LOGIN, rf"\1{MASK}"),
    (("mysql", "mariadb", "sshpass", "sqlcmd"), _PROGRAM, rf"\1{MASK}"),
    (("login",), _NETRC, rf"\1{MASK}"),
    (("hooks.slack.com/", "/webhooks/"), _HOOK, rf"\1{MASK}"),
    (("eyJ",), _JWT, MASK),
    (_SHAPES, _TOKENS, MASK),
]
_TELLING = re.compile(r"(?i)token|pass|pwd?|auth|secret|credential|key")


@lru_cache(maxsize=10_000)
def announces_secret(name: str) -> bool:
    """Whether values of this name are masked: `hf_token`, `DB_PASS` and `api_key`, not `pad_token`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _PLACES:
        return False
    if words[-1] == "token" and not _PLAIN_TOKENS.intersection(words[-2:-1]):
        return True
    if words == ["pwd"]:
        return name != "PWD"  # which is the shell's working directory
    if len(words) == 1 and words[0] in _ALONE:
        return True
    if words[-1] in ("pass", "pwd", "key") and name.isupper():
        return len(words) > 1
    if words[-1] in ("pass", "pwd", "pw") and _ACCOUNTS.intersection(words[-2:-1]):
        return True
    if re.sub("(pass|pwd)$", "", words[-1]) in _ACCOUNTS and words[-1] not in _ACCOUNTS:
        return True
    return any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) for word in words) or any(
        first in _SECRET_KEYS and second in {"key", "keys"} for first, second in pairwise(words)
    )


def redacted_text(text: str) -> str:
    """`text` with users and passwords in URIs, assigned secrets, private keys and tokens masked."""
    if "PRIVATE KEY" in text:
        text = _without_private_keys(text)
    if "://" in text:
        parts = text.split("://")
        rest = [_without_user(after, before.endswith(_OF_PAGES)) for before, after in pairwise(parts)]
        text = "://".join([parts[0], *rest])
    for hints, rule, instead in _RULES:
        if any(hint in text for hint in hints):
            text = rule.sub(instead, text)
    if _TELLING.search(text) is None:
        return text
    if "--" in text or "setenv" in text:
        text = _masked(text, _OPTION)
    return _masked(text, _NAMED)


def _masked(text: str, names: re.Pattern[str]) -> str:
    """`text` with the values behind secret names masked."""
    parts, end, place = [], 0, 0
    while (match := names.search(text, place)) is not None and match["name"] is not None:
        place = match.end()
        if announces_secret(match["name"]):
            stop = _value_end(text, match)
            if stop > place:
                parts += [text[end:place], MASK]
                end = place = stop
    return "".join(parts) + text[end:] if parts else text


def _value_end(text: str, match: re.Match[str]) -> int:
    """The end of the value behind a secret name; its beginning if it is none."""
    between = match.groupdict().get("between")
    value = _VALUE.match(text, match.end())
    if value is None or (between == " = " and _CALL.match(value[0])):
        return match.end()
    bare = match["name"].lower() in ("token", "pass", "auth") and between == ": "
    if bare and (len(value[0]) < 6 or not re.search(r"\d", value[0]) or _NUMBER.fullmatch(value[0])):
        return match.end()  # prose: `nats per token: 3.2`
    return value.end()


def _without_user(rest: str, is_page: bool) -> str:
    """What stands behind `://`, without the user and the password, which may hold slashes and @.

    `http://host:8080/a@b` names a page, but `postgres://me:8080/a@b` has a password.
    """
    authority = _USER.match(rest)
    assert authority is not None
    whole = (_PASSWORD if is_page else _ANY_PASSWORD).match(rest)
    if whole is not None and "@" in whole[0]:
        place = whole[0].rindex("@") + 1
        if "@" not in authority[0] or _HOST.match(rest[place : place + 300]):
            return f"{MASK}@{rest[place:]}"
    if "@" in authority[0]:
        return f"{MASK}@{rest[authority[0].rindex('@') + 1 :]}"
    return rest


def _without_private_keys(text: str) -> str:
    parts, end, ended = [], 0, True
    for begin in _BEGIN_KEY.finditer(text):
        if begin.start() < end:
            continue
        place = text.find("-----END", begin.end()) if ended else -1
        ended = place >= 0  # without an end there is none later on either
        body = _KEY_BODY.match(text, begin.end())
        assert body is not None
        parts += [text[end : begin.end()], MASK]
        end = place if ended else body.end()
    return "".join(parts) + text[end:]


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


class Masked(logging.Formatter):
    """Formats log records with secrets masked."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback if there is one."""
        return redacted_text(super().format(record))


def one_line(error: BaseException) -> str:
    """The type and message of `error` on one line, with secrets masked."""
    return redacted_text(" ".join(f"{type(error).__name__}: {error}".split())).rstrip(": ")
