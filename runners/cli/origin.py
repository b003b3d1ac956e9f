"""The origin of an update, in words."""

from pathlib import Path


def answered(before: str, after: str, known: Path | None) -> str:
    """The likelihoods, the origins that fit and the answer, one a line; or why there is none."""
    from weightgeom.origins.answer import origin

    judgement = origin(before, after, known=known)
    lines = []
    if judgement.likelihoods:
        ranked = sorted(judgement.likelihoods.items(), key=lambda item: -item[1])
        lines += [f"{name:14}{value:.3f}" for name, value in ranked]
        lines += [
            "",
            f"any adapter   {judgement.lora:.3f}",
            f"no training   {judgement.noise:.3f}",
            f"fit at 90 %   {', '.join(judgement.fits) or 'none'}",
        ]
    lines.append(f"answer        {judgement.answer or f'cannot tell: {judgement.reason}'}")
    return "\n".join(lines)
