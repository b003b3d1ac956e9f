"""The limits of MLflow and of the databases behind it, and how names and texts are made to fit them.

MLflow cuts some longer texts in silence and refuses others; PostgreSQL and MySQL refuse text that exceeds a
column. A text that is cut keeps its beginning and ends in a digest, so that different ones stay different.
"""

import hashlib
import posixpath
import re

KEY_LENGTH = 250  # of params, metrics and tags
PARAM_LENGTH, TAG_LENGTH = 6000, 5000  # of values; servers before MLflow 3 take 5000 in a tag
RUN_NAME_LENGTH, EXPERIMENT_NAME_LENGTH, USER_LENGTH = 250, 250, 250
DATASET_NAME_LENGTH, DATASET_DIGEST_LENGTH, DATASET_SOURCE_LENGTH, CONTEXT_LENGTH = 500, 36, 65_000, 250
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
BATCH_BYTES = 500_000  # of JSON; a server refuses 1,000,000
SQLITE_PATH = 500  # bytes; SQLite opens no file with a longer path


def fitted(text: str, length: int) -> str:
    """`text` in at most `length` characters; a longer one ends in a digest of the whole."""
    text = text.replace("\0", "\\0")  # PostgreSQL refuses NUL characters
    if len(text) <= length:
        return text
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
    mark = f" ... [cut: {len(text)} characters in run.json, {digest}]" if length >= 500 else f"...{digest}"
    return text[: length - len(mark)] + mark


def key(name: str) -> str:
    """`name` in the form that MLflow accepts: letters, digits and `_-. /`, as a path in its shortest form."""
    clean = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name)
    parts = [part for part in clean.split("/") if part.strip(".")]
    return fitted(posixpath.join(*parts), KEY_LENGTH).rstrip("/") if parts else "_"
