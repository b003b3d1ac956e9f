"""The warnings of a run, kept from its start so that its end can repeat them."""

import logging

KEPT = 50  # different warnings, so that a loop of them fills no memory


class Warned(logging.Handler):
    """Keeps the text of every different warning and error in the order of their first time."""

    def __init__(self, level: int = logging.WARNING) -> None:
        super().__init__(max(level, logging.WARNING))
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of `record`, once."""
        text = record.getMessage()
        if text not in self.texts and len(self.texts) < KEPT:
            self.texts.append(text)


def warnings() -> list[str]:
    """The warnings since the start of the process, of the handler that the logging configuration installs."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, Warned)]
    return list(dict.fromkeys(text for handler in handlers for text in handler.texts))
