import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from app import run
from cluster import INSTALL, Cluster, cluster_in, missing
from sweeps import TINY


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(f"there is no SLURM to test with ({', '.join(lacking)} not found): {INSTALL}")
    with TemporaryDirectory(prefix="slurm-") as folder:  # the parents of tmp_path are private
        os.chmod(folder, 0o755)
        with cluster_in(Path(folder) / "cluster") as made:
            yield made


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs with the pretrained base that all runs here start from, and an empty store."""
    home = tmp_path_factory.mktemp("base")
    ended = run(home, *TINY, "objective=none")
    assert ended.code == 0, ended.err
    shutil.rmtree(home / "outputs/jobs")
    return home / "outputs"
