"""Pages of the reference that come from the project's own files: layers, configuration and architectures.

`mkdocs` calls `on_files` as a hook; `python docs/generate.py` draws the pictures of the layers anew, and
verifies every residual map for the page of architectures.
"""

import html
import re
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROOM = 150, 34  # width and height of a box, in pixels
GAP = 10


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File  # only there when the docs are built

    pages = {
        "reference/layers.md": layers_page(),
        "reference/configuration.md": configuration_page(),
    }
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    return files


def contracts() -> dict[str, list[list[str]]]:
    """The layers of each package, top first, as the import contracts state them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {
        contract["containers"][0]: [re.split(r"\s*[|:]\s*", layer) for layer in contract["layers"]]
        for contract in settings["contracts"]
        if contract["type"] == "layers"
    }


def layers_svg(layers: list[list[str]]) -> str:
    """A row of boxes for every layer; each may import the rows below it."""
    (width, height), widest = ROOM, max(map(len, layers))
    total = widest * (width + GAP) + GAP, len(layers) * (height + GAP) + GAP
    shapes = []
    for row, names in enumerate(layers):
        left = (total[0] - len(names) * (width + GAP) + GAP) / 2
        for column, name in enumerate(names):
            x, y = left + column * (width + GAP), GAP + row * (height + GAP)
            shapes.append(
                f'<rect x="{x:g}" y="{y}" width="{width}" height="{height}" rx="4" fill="#f6f8fa" stroke="#57606a"/>'
                f'<text x="{x + width / 2:g}" y="{y + 22}" text-anchor="middle" fill="#1f2328">{name}</text>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" role="img"'
        f' font-family="sans-serif" font-size="14" style="max-width: {total[0]}px">{"".join(shapes)}</svg>'
    )


def layers_page() -> str:
    """The page on the layers, drawn from the contracts."""
    parts = [
        "# Layers\n",
        "The import contracts in `pyproject.toml`, checked by `lint-imports`: a room may import the rows below"
        " it, and rooms in one row know nothing of each other.\n",
    ]
    for package, layers in contracts().items():
        parts.append(f"## {package}\n\n{layers_svg(layers)}\n")
        parts.append("| room | is about |\n|---|---|")
        parts += [f"| `{name}` | {about(package, name)} |" for layer in layers for name in layer]
        parts.append("")
    return "\n".join(parts)


def about(package: str, name: str) -> str:
    """The first sentence of a room's docstring."""
    folder = ROOT / package / name
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    found = re.match(r'"""(.+?)(?:\n\n|""")', path.read_text(), re.S)
    return " ".join(found[1].split()).replace("|", "\\|") if found else ""


def choices() -> Iterator[tuple[str, str, str]]:
    """Group, choice and text of every YAML file of the configuration."""
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        place = path.relative_to(ROOT / "conf")
        if place.parts[0] != "local" and len(place.parts) > 1:
            yield (
                place.parts[0],
                place.relative_to(place.parts[0]).with_suffix("").as_posix(),
                path.read_text(),
            )


def configuration_page() -> str:
    """Every choice of every group, as its YAML file has it."""
    parts = [
        "# Configuration\n",
        "Every file in `conf/`. `group=choice` selects one, `group.key=value` changes a key.\n",
        f"## config.yaml\n\n```yaml\n{(ROOT / 'conf/config.yaml').read_text().strip()}\n```\n",
    ]
    group = ""
    for name, choice, text in choices():
        if name != group:
            group = name
            parts.append(f"## {group}\n")
        parts.append(f"### {group}={choice}\n\n```yaml\n{html.unescape(text.strip())}\n```\n")
    return "\n".join(parts)


def verified() -> dict[str, list[tuple[str, list[str]]]]:
    """By model type, each small network of it that the tests have, with the claims that do not hold for it."""
    sys.path.append(str(ROOT / "tests/helpers"))
    from networks import CONFIGS, MIXTURES

    from weightgeom.check import CHECKS, failure
    from weightgeom.models.specimen import Specimen

    verified_by_type: dict[str, list[tuple[str, list[str]]]] = {}
    for name, config in (CONFIGS | MIXTURES).items():
        specimen = Specimen.of(config(50, 16))
        failed = [check.__name__ for check in CHECKS if failure(check, specimen) is not None]
        verified_by_type.setdefault(specimen.network.config.model_type, []).append((name, failed))
    return verified_by_type


def architectures_page() -> str:
    """A table of the model types that have a map: models, verified claims, version of transformers, date."""
    import transformers

    from weightgeom.check import CHECKS

    date = datetime.now(UTC).date().isoformat()
    parts = [
        "# Architectures\n",
        "Model types with a residual-stream map. Every map is verified by behaviour: the claims below are tested on"
        " small random networks of the type's own config class, one for each form that it has. `weightgeom check"
        " MODEL_OR_TYPE` tests them for any checkpoint, `python docs/generate.py` makes this page.\n",
        "Of a model that also sees or hears, such as `gemma3`, `mistral3`, `llama4` or `qwen3_5`, the text part is measured.\n",
        "| model type | models | networks | claims that hold | transformers | date |\n|---|---|--:|--:|---|---|",
    ]
    for model_type, networks in sorted(verified().items()):
        docstring = (ROOT / f"weightgeom/architectures/{model_type}.py").read_text()
        models = " ".join(docstring.split('"""')[1].split()).removesuffix(".")
        held = len(CHECKS) - len({name for _, failed in networks for name in failed})
        parts.append(
            f"| `{model_type}` | {models} | {len(networks)} | {held} of {len(CHECKS)} |"
            f" {transformers.__version__} | {date} |"
        )
    parts += ["\n## Claims\n", *(f"- {(check.__doc__ or '').splitlines()[0]}" for check in CHECKS)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    for package, layers in contracts().items():
        (ROOT / f"docs/layers_{package}.svg").write_text(layers_svg(layers))
    (ROOT / "docs/reference/architectures.md").write_text(architectures_page())
