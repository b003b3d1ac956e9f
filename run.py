"""Hydra in, objects out: `python run.py`, with `-m` for a sweep, with `--help` for the choices."""

import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from runners.complaints import complaint
from runners.launcher import register

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runners.experiment import Experiment


def parts(config: DictConfig) -> dict[str, Any]:
    """The objects that a configuration describes: building them checks every key and type of it."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    for key, kind in {"name": str, "seed": int, "outputs": str, "tracking_uri": str, "tags": dict}.items():
        if not isinstance(plain[key], kind):
            raise ValueError(f"{key} must be of type {kind.__name__}, got {plain[key]!r}")

    def build(key: str, choice: dict[str, Any]) -> Any:
        from hydra.utils import instantiate  # noqa: PLC0415 (not needed for --help)

        try:
            return instantiate(choice, _convert_="all")
        except Exception as error:
            raise ValueError(f"in {key}: {complaint(error)}") from error

    return {
        **{key: build(key, plain[key]) for key in ("model", "data", "training")},
        "objective": build("objective", plain["objective"]) if plain["objective"].get("_target_") else None,
        "probes": {key: build(f"probe.{key}", choice) for key, choice in plain["probe"].items()},
        "device": device(plain["device"]),
        **{key: plain[key] for key in ("name", "seed", "tracking_uri", "tags")},
    }


def experiment(config: DictConfig) -> "Experiment":
    """The experiment that a configuration describes, with the places that Hydra chose for it."""
    from pathlib import Path  # noqa: PLC0415 (not needed for --help)

    from hydra.core.hydra_config import HydraConfig  # noqa: PLC0415
    from hydra.types import RunMode  # noqa: PLC0415

    from runners.experiment import Experiment  # noqa: PLC0415 (heavy)

    hydra_config = HydraConfig.get()
    choices = {key: hydra_config.runtime.choices[key] for key in ("model", "data", "objective", "training")}
    changed = [override for override in hydra_config.overrides.task if not override.startswith("objective=")]
    plain = OmegaConf.to_container(config, resolve=True)
    sweep = Path(hydra_config.sweep.dir).resolve() / "record"
    return Experiment(
        **parts(config),
        run_name=" ".join([choices["objective"], *changed]),
        outputs=Path(config.outputs).resolve(),
        directory=Path(hydra_config.runtime.output_dir).resolve(),
        params={**dict(flattened(plain)), **choices},
        config=OmegaConf.to_yaml(config, resolve=True),
        parent=sweep if hydra_config.mode == RunMode.MULTIRUN else None,
    )


def flattened(tree: Any, prefix: str = "") -> "Iterator[tuple[str, Any]]":
    """Every leaf of a nested configuration with its dotted key."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))


def device(wanted: str) -> str:
    """`cpu` or `cuda`; `auto` is the accelerator where there is one."""
    import torch  # noqa: PLC0415 (heavy)

    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, and torch sees no GPU here: use device=cpu or device=auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def job(config: DictConfig) -> None:
    """One run; its traceback, if it fails, goes beside its record."""
    try:
        experiment(config).run()
    except Exception:
        from pathlib import Path  # noqa: PLC0415 (not needed for --help)

        from hydra.core.hydra_config import HydraConfig  # noqa: PLC0415

        Path(HydraConfig.get().runtime.output_dir, "traceback.txt").write_text(traceback.format_exc())
        raise


register(parts)


def main() -> None:
    """Run Hydra; whatever goes wrong is told in one sentence, with a non-zero exit."""
    verbose = bool(os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them itself
    try:
        job()
    except Exception as error:
        if verbose:
            raise
        print(f"error: {complaint(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
