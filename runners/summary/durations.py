"""Durations in words."""


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, rounded to the accuracy of an estimate."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
