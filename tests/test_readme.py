"""The commands of the README, read from it: alike in bash and zsh, and run as they are written."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import hub
import pytest
from app import ROOT, SMALL, WORLD, environment
from networks import save
from warm import Warm

README = (ROOT / "README.md").read_text()
SET_UP = re.findall(r"^    (python3\.11 .*)$", README, re.MULTILINE)
COMMANDS = re.findall(r"`(weightgeom [^`]*)`", README)
SHORT = [override for override in SMALL if override.startswith("training.")]
PROBE = ["probe=[rsf]", "probe.rsf.tokens=256", "probe.rsf.resamples=4", "device=cpu"]
NO_PROBE = ["probe=[]", "device=cpu"]
TINY = [override for override in SMALL if override.startswith(("model.", "+model."))]
# The overrides that make a command small, by a part of the command; every command of a run has one.
SMALLER = {
    "data=text data.train=my.txt objective=ce": [*TINY, *SHORT, *NO_PROBE],
    "data=preferences data.train=pairs.jsonl objective=dpo": [*TINY, *SHORT, *NO_PROBE],
    "compare A B": ["device=cpu", "probe.rsf.tokens=256"],
    "model=chain/own": PROBE,
    "model.name=DIR": PROBE,
    "model=pythia": [*SHORT, *NO_PROBE],
    "objective=ce,dpo seed=0,1 -m": [*TINY, *WORLD, *SHORT, *NO_PROBE, "objective=dpo", "seed=0"],
    "hydra/launcher=slurm": [*TINY, *WORLD, *SHORT, *NO_PROBE, "plan=true"],  # tests/slurm starts such sweeps
    "experiment=paper": [
        *(*TINY, *WORLD, *SHORT, *PROBE, "objective=dpo", "seed=0", "name=scratch"),
        *("intervention.rank1.strengths=[0.1]", "+intervention.rank1_frobenius.strengths=[0.1]"),
        *("intervention.rank1.layers=[1]", "+intervention.rank1_frobenius.layers=[1]"),
        *("intervention.surgery.k=[4]", "intervention.surgery.operations=[remove]"),
        *("intervention.surgery.groups=[[q]]", "intervention.surgery.transplants=[]"),
    ],
}


def test_the_set_up_commands_are_two() -> None:
    assert [command.split(" && ")[-1] for command in SET_UP] == [
        ".venv/bin/python run.py",
        ".venv/bin/pytest -n 3",
    ]
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_passes_a_command_on_as_it_is_written(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}: apt-get install {shell}")
    for command in COMMANDS:
        script = f"weightgeom() {{ printf '%s\\0' \"$@\"; }}\n{command}"
        words = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True).stdout
        assert words.split("\0")[:-1] == shlex.split(command)[1:], command
        assert "#" not in command  # which interactive zsh passes on


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the README's commands name."""
    place = tmp_path_factory.mktemp("readme")
    words = "the tall mast of the ship carried a red flag over the quiet sea in the morning".split()
    documents = [" ".join(words[i % 17] for i in range(n, n + 12)) for n in range(40)]
    (place / "my.txt").write_text("\n\n".join(documents))
    pairs = [
        {"prompt": f"which sail {n % 7}?", "chosen": f"the red one {n}", "rejected": f"no sail {n}"}
        for n in range(30)
    ]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for seed, name in enumerate("ABC"):
        save("llama", place / name, seed)
    for step in (100, 200):
        save("gpt_neox", place / f"DIR/checkpoint-{step}", step)
    return place


def test_every_command_does_what_the_readme_says(home: Path) -> None:
    binaries = home / "bin"
    binaries.mkdir()
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom runners.cli.app import app\n\napp()\n"
    (binaries / "weightgeom").write_text(script)  # as pip writes it
    pythia = save("gpt_neox", home / "pythia")
    sweep, untried = "", []
    with hub.served({"models/EleutherAI/pythia-160m": {"step143000": pythia}}) as server:
        variables = {
            **environment({}),
            **{"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            **{"HF_ENDPOINT": server.url, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0"},
        }
        process = Warm(variables)
        for command in COMMANDS:
            smaller = next((more for part, more in SMALLER.items() if part in command), [])
            if not smaller and re.search(r"weightgeom (run|compare)", command):
                untried.append(command)
            written = command.replace("SWEEP_DIR", sweep).replace("NAME", "scratch")
            words = [*shlex.split(written)[1:], *smaller]  # as a shell splits them
            code, out, err = process.run(home, binaries / "weightgeom", words, variables)
            assert code == 0, f"{shlex.join(words)}\n{out}\n{err}"
            if found := re.search(r"sweep: (\S+)", out + err):
                sweep = found[1]
    assert not untried
    assert sweep
