"""Names whose values are secrets: `hf_token`, `DB_PASS` and `api_key`, but not `pad_token`."""

import re
from functools import lru_cache
from itertools import pairwise

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = set(
    "secret secrets credential credentials creds apikey apitoken authtoken accesstoken hftoken passcode"
    " passwort kennwort passe accesskey accountkey authkey privatekey secretkey masterkey webhook"
    " sessionid jsessionid phpsessid csrftoken".split()
)
_SECRET_ENDS = ("password", "passwords", "passwd", "passphrase")  # PGPASSWORD is one word
_SECRET_KEYS = set(  # key
    "api access private account encryption decryption signing subscription ssh gpg master service deploy"
    " license wandb storage shared session admin hmac consumer".split()
)
# Names of tokens of language models, which are not secret: `pad_token`, `next_token`.
_PLAIN_TOKENS = set("pad eos bos unk sep cls mask special first last next per each new".split())
_ACCOUNTS = set(
    "db database my mysql pg postgres sql redis mongo smtp ftp mail email user admin root".split()
)
_ALONE = {"pass", "auth", "pw", "bearer"}  # secret if they are the whole name
_PLACES = {"file", "path", "dir", "directory", "yaml", "yml", "txt", "py", "length"}


@lru_cache(maxsize=10_000)
def announces_secret(name: str) -> bool:
    """Whether values of this name are masked."""
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
    if any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) for word in words):
        return True
    pairs = list(pairwise(words))
    return ("session", "id") in pairs or any(
        first in _SECRET_KEYS and second in {"key", "keys"} for first, second in pairs
    )
