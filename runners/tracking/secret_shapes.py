"""Secrets that their shape or place gives away: tokens, headers, options, keys, passwords in URIs.

Each rule starts where no longer word could: tried at every place within a word, it would take quadratic time.
Repetitions are possessive (++) or bounded for the same reason.
"""

import re
from itertools import pairwise

MASK = "***"

_BEGIN_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-----|---- BEGIN SSH2 [A-Z ]{0,20}PRIVATE KEY ----"
    r"|Private-Lines: \d{1,6}"
)
_KEY_BODY = re.compile(  # lines may be quoted, commented or indented
    r"(?:[\s>#|+]|\\n)*+(?:(?:Proc-Type|DEK-Info|Version|Comment): [\w ,.\-\"@]*+(?:[\s>#|+]|\\n)*+)*+"
    r"[A-Za-z0-9+/=\s\\>#|]*+(?:-MAC: \w++)?"
)
_USER = re.compile(r"[^\s\"'<>`/]*+")
_PASSWORD = re.compile(r"[^\s\"'<>`/:@]*+:(?!\d+[/?#])[^\s\"'<>`]*+")
_ANY_PASSWORD = re.compile(_PASSWORD.pattern.replace(r"(?!\d+[/?#])", ""))
_OF_PAGES = ("http", "https", "ftp", "sftp", "file", "s3", "gs", "hdfs", "ssh", "git")
# A URI as a path, which has one slash behind the scheme: /home/me/https:/user:password@host.
_OF_PATH = re.compile(
    r"((?<![\w+.\-])[A-Za-z][\w+.\-]{1,20}:/)(?!/)"
    r"(?:[^\s\"'<>`/:@]{1,300}+@|[^\s\"'<>`/:@]{0,300}+:[^\s\"'<>`]{1,300}@)"
)
_HOST = re.compile(r"[\w\-]+[.:/]|localhost|$")

_QUOTE = r"\\{0,7}[\"']"  # in JSON within JSON, quotes are escaped
_WORD = r"(?:'[^'\n]*+'|\"[^\"\n]*+\"|[^\s\"']++)"
_AUTHORIZATION = re.compile(
    rf"(?i)(authorization(?:{_QUOTE}\s{{0,4}}[:=,]|[ \t]{{0,4}}[:=])\s{{0,4}}(?:b?{_QUOTE})?"
    r"(?:(?:basic|bearer|token|digest|negotiate)[ \t]{1,4})?)"
    r"(?=[^\s\"'\\]{2})(?:[^\n\"'\\]|(?<==)\\?\"[^\"\n]{0,500}\")++"
)
_BEARER = re.compile(r"(?i)((?<!\w)bearer[ \t]{1,4})(?=[\w.\-~+/=]{0,100}?\d)[\w.\-~+/=]{8,}+")
_COOKIE = re.compile(
    rf"(?i)((?<!\w)(?:set-)?cookies?(?:{_QUOTE}[ \t]{{0,4}}[:=,]|[ \t]{{0,4}}[:=])[ \t]{{0,4}}(?:{_QUOTE})?"
    r"|<cookie |(?<!\w)cookie\()"
    r"(?=[^\s\"'\\])(?:\{[^{}\n]*+|(?<=\()[^()\n]*+|[^\n\"'\\]++)"
)
_QUERY = re.compile(
    r"(?i)([?&#](?:[\w\-.]{0,30}?(?:sig|signature|hmac|sas|auth|credential|security-token)|key|code)=)"
    r"[^&\s\"'\\]++"
)
_LOGIN = re.compile(
    r"((?<!\S)(?:-u[ =]?|-[A-Za-z]{1,6}u[ ]|--(?:proxy-)?user[ =])[^\s:=/]{1,100}+:)(?=\S)[^\s\"']++"
)
_USER_AND_PASSWORD = re.compile(
    rf"((?<!\S)(?:-u|--user(?:name)?)[ =]?[^\s=]{{1,100}}+[ \t]{{1,8}}-p[ =]?)(?=[^\s\-]){_WORD}"
)
_PROGRAM = re.compile(  # options of one letter, which mean a password for these programs
    r"((?<!\w)(?:(?:mysql|mariadb|mongo)\w{0,10}(?:[ \t]++(?!-p)\S{1,100}+){0,12}[ \t]++-p ?"
    r"|(?:docker|podman|nerdctl|helm|oc|az|skopeo|buildah)(?:[ \t]++(?!-p)\S{1,100}+){0,3}[ \t]++login"
    r"(?:[ \t]++(?!-p)\S{1,100}+){0,8}[ \t]++-p[ =]?"
    r"|sshpass(?:[ \t]++(?!-p)\S{1,100}+){0,4}[ \t]++-p ?"
    r"|(?:sqlcmd|bcp)(?:[ \t]++(?!-P)\S{1,100}+){0,12}[ \t]++-P ?"
    r"|redis-cli(?:[ \t]++(?!-a)\S{1,100}+){0,8}[ \t]++-a "
    rf"|ldap\w{{2,10}}+(?:[ \t]++(?!-w)\S{{1,100}}+){{0,12}}[ \t]++-w ?))(?=[^\s\-]){_WORD}"
)
_NETRC = re.compile(
    r"((?<!\w)(?:machine\s{1,8}\S{1,100}+|default|login\s{1,8}\S{1,100}+)"
    r"(?:\s{1,8}(?:login|account)\s{1,8}\S{1,100}+){0,2}\s{1,8}(?:password|passwd)\s{1,8})\S++"
)
_PGPASS = re.compile(r"(:(?:\d{4,5}|\*):[^:\s\"']{1,100}+:[^:\s\"']{1,100}+:)(?=\S)[^\s\"']++")
_AT_HOST = re.compile(  # scp me:password@host: and Oracle's me/password@host
    r"((?<![\w/@.\-:])[A-Za-z][\w.\-]{0,63}+:(?!//)|jdbc:oracle:\w{1,10}:[^\s/:@]{1,64}+/)"
    r"[^\s@:/\"']{4,100}+@(?!sha256:)(?=[\w\-]{1,60}(?:[.:/]))"
)
_HOOK = re.compile(
    r"((?:hooks\.slack\.com/(?:services|workflows)|discord(?:app)?\.com/api/webhooks|office\.com/webhook(?:b2)?"
    r"|api\.telegram\.org)/)[^\s\"'<>]++"
)
_ODBC = re.compile(  # in upper case alone it is a shell's directory
    r"(;[ ]?PWD ?= ?|(?<!\w)PWD=(?=[^\s;]{1,100};\w{1,30}=))(?=[^\s/~.$\"'])[^\s;\"']++"
)
_PROSE = re.compile(  # a digit and a letter, but no number, since `token` and `password` are words
    r"(?i)((?<![\w\-])(?:password|passphrase|passcode|(?:api|access|secret)[ _]?key|secret|token)"
    r"(?: (?:is|was|provided|given|for [\w.@\-]{1,60}))?(?:: ?|[ \t])[\"'`]?)"
    r"(?![\d.,]{1,40}(?:[eE][+\-]?\d{1,4})?[,;:)%]?(?:\s|\Z))"
    r"(?=[^\s\"'`]{0,60}?\d)(?=[^\s\"'`]{0,60}?[A-Za-z])[A-Za-z0-9][^\s\"'`,;]{7,}+"
)
_JWT = re.compile(r"(?<![\w\-])eyJ[\w\-]{8,}+\.[\w\-]{8,}+(?:\.[\w\-]*+){0,3}")
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?=[hgxArsynpSdlnaEk1-9])(?:hf_[A-Za-z0-9]{30,}+|api_org_[A-Za-z0-9]{30,}+"
    r"|gh[oprsu]_[A-Za-z0-9]{30,}+|github_pat_\w{22,}+"
    r"|gl(?:pat|ptt|dt|rt|cbt|ft|imt|agent|oas|soat)-[\w\-]{14,}+"
    r"|xox[a-z](?:\.xox[a-z])?-[A-Za-z0-9\-]{10,}+|xapp-[\w\-]{20,}+|AIza[\w\-]{30,}+"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])(?:[\"']?[\s:,;]{1,4}[\"']?[A-Za-z0-9/+]{30,}+)?"
    r"|sk-(?:ant|proj|svcacct|admin|or)-[\w\-]{20,}+|(?<!-)sk-(?:[a-z0-9]{1,20}-){0,4}(?=\w{0,40}\d)\w{20,}+[\w\-]*+"
    r"|[rs]k_(?:live|test)_\w{16,}+|ya29\.[\w\-]{20,}+|npm_[A-Za-z0-9]{30,}+|pypi-[\w\-]{50,}+"
    r"|SG\.[\w\-]{16,}+\.[\w\-]{16,}+|AGE-SECRET-KEY-1[A-Z0-9]{20,}+|SK[0-9a-f]{32}(?!\w)|key-[0-9a-f]{32}(?!\w)"
    r"|dapi[a-f0-9]{32}|hv[sb]\.[\w\-]{20,}+|do[por]_v1_[a-f0-9]{40,}+|ATATT3[\w\-=]{20,}+|lin_api_\w{30,}+"
    r"|gsk_\w{30,}+|xai-\w{30,}+|nvapi-[\w\-]{30,}+|r8_\w{30,}+|EAA[A-Za-z0-9]{30,}+|1//0[\w\-]{30,}+"
    r"|AC[0-9a-f]{32}:\S{8,}+|[1-9]\d{7,9}:AA[\w\-]{32,}+)"
)
_SHAPES = (
    *("hf_", "gh", "github_pat_", "gl", "xox", "xapp-", "AIza", "AKIA", "ASIA", "sk-", "sk_", "rk_"),
    *("ya29.", "npm_", "pypi-", "SG.", "AGE-SECRET-KEY-", "dapi", "hvs.", "hvb.", "_v1_", "ATATT3"),
    *("lin_api_", "gsk_", "xai-", "nvapi-", "r8_", "api_org_", "key-", "SK", "AC", "EAA", "1//0", ":AA"),
)
# Tokens of any other vendor: a short name and a random word of both cases with several digits.
_RANDOM = re.compile(
    r"(?<![\w\-./])[A-Za-z][\w.\-]{0,30}?[_\-.](?=[A-Za-z]{0,40}+\d+[A-Za-z]{1,40}+\d)"
    r"(?=[a-z\d]{0,40}+[A-Z])(?=[A-Z\d]{0,40}+[a-z])[A-Za-z0-9]{24,}+[\w\-]*+"
)
# The words that make a rule worth trying, the rule, and the replacement of the secret.
_RULES = [
    (("uthorization", "UTHORIZATION"), _AUTHORIZATION, rf"\1{MASK}"),
    (("earer", "EARER"), _BEARER, rf"\1{MASK}"),
    (("ookie", "OOKIE"), _COOKIE, rf"\1{MASK}"),
    (("=",), _QUERY, rf"\1{MASK}"),
    (("u", "user"), _LOGIN, rf"\1{MASK}"),
    (("-p",), _USER_AND_PASSWORD, rf"\1{MASK}"),
    ((" -p", " -P", " -a", " -w"), _PROGRAM, rf"\1{MASK}"),
    (("passw",), _NETRC, rf"\1{MASK}"),
    ((":",), _PGPASS, rf"\1{MASK}"),
    ((":/",), _OF_PATH, rf"\1{MASK}@"),
    (("@",), _AT_HOST, rf"\1{MASK}@"),
    (("hooks.slack.com/", "/webhook", "telegram"), _HOOK, rf"\1{MASK}"),
    (("PWD",), _ODBC, rf"\1{MASK}"),
    (("eyJ",), _JWT, MASK),
    (_SHAPES, _TOKENS, MASK),
    (("_", "-", "."), _RANDOM, MASK),
    (("ass", "ASS", "oken", "OKEN", "ecret", "ECRET", "ey", "EY"), _PROSE, rf"\1{MASK}"),
]


def without_shapes(text: str) -> str:
    """`text` without private keys, users and passwords in URIs, and tokens."""
    if "PRIVATE KEY" in text or "Private-Lines" in text:
        text = _without_private_keys(text)
    if "://" in text:
        parts = text.split("://")
        rest = [_without_user(after, before.endswith(_OF_PAGES)) for before, after in pairwise(parts)]
        text = "://".join([parts[0], *rest])
    for hints, rule, instead in _RULES:
        if any(hint in text for hint in hints):
            text = rule.sub(instead, text)
    return text


def _without_user(rest: str, is_page: bool) -> str:
    """The rest of a URL behind `://`, without the user and the password, which may hold slashes and @.

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
        marked = begin[0].startswith("--")
        place = (
            text.find("---- END" if begin[0][4] == " " else "-----END", begin.end())
            if marked and ended
            else -1
        )
        ended = ended and (place >= 0 or not marked)  # without an end there is none later on either
        body = _KEY_BODY.match(text, begin.end())
        assert body is not None
        parts += [text[end : begin.end()], MASK]
        end = place if place >= 0 else body.end()
    return "".join(parts) + text[end:]
