"""Chat templates, rendered in a child process that bounds their time, memory and output.

A template is a program that comes with a checkpoint: jinja's sandbox keeps it from the machine's files, but
not from looping or from filling the memory.
"""

import json
import multiprocessing
import os
import resource
import signal
import warnings
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from weightgeom.text.files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0  # of processor time for one conversation; an ordinary template takes about a millisecond
MEMORY = 2**30  # bytes, beyond those of this process
CHARACTERS, GROWTH = 2**20, 20  # a rendering may have this many characters, and 20 times its messages' more
PATIENCE = 600.0  # seconds until a child without an answer is given up
Conversation = list[dict[str, str]]


def rendered(
    conversations: Sequence[tuple[Conversation, bool]], tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """Conversations as the tokenizer's chat template writes them.

    The second item of each says whether the header of the assistant's next message ends the text.

    Raises:
        ValueError: if the template refuses a conversation, or exceeds the bounds of this module.
    """
    if not conversations:
        return []
    # Forked rather than started: the bounds hold from the first conversation on, without a second import.
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_render, args=(sender, conversations, tokenizer))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # the child takes no lock of a thread
        child.start()
    sender.close()
    texts = []
    try:
        for _ in conversations:
            answer = json.loads(_received(receiver))
            if problem := answer.get("problem"):
                raise ValueError(f"the chat template of {tokenizer.name_or_path} {problem}")
            texts.append(answer["text"])
    except EOFError as error:
        child.join()
        problem = (
            f"takes more than {SECONDS:g} s of processor time for one conversation"
            if child.exitcode == -signal.SIGPROF
            else f"ended its process (exit code {child.exitcode})"
        )
        raise ValueError(f"the chat template of {tokenizer.name_or_path} {problem}") from error
    finally:
        child.kill()
        child.join()
        child.close()
        receiver.close()
    return texts


def _received(receiver: Connection) -> bytes:
    if not receiver.poll(PATIENCE):
        raise EOFError
    return receiver.recv_bytes()


def _render(
    sender: Connection,
    conversations: Sequence[tuple[Conversation, bool]],
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Send the rendering of every conversation, or a problem."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)  # those of the run write its record
    _bound_memory()
    for messages, header in conversations:
        # The kernel's timer, because no Python code runs inside a long power or repetition.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer = _answer(messages, header, tokenizer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sender.send_bytes(json.dumps(answer).encode())


def _answer(messages: Conversation, header: bool, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    limit = CHARACTERS + GROWTH * sum(len(message["content"]) for message in messages)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
    except MemoryError:
        return {"problem": f"takes more than {MEMORY / 2**30:g} GiB of memory for one conversation"}
    except Exception as error:  # the template's own: jinja's, and those of the code that it runs
        return {"problem": f"refuses a conversation ({first_line(error)})"}
    if len(text) > limit:
        return {"problem": f"writes {len(text)} characters for one conversation, more than {limit}"}
    return {"text": str(text)}


def _bound_memory() -> None:
    with suppress(OSError, ValueError):  # no /proc, or a lower bound already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, hard))
