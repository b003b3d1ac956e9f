import json
from pathlib import Path

import pandas as pd
import pytest

from runners.pipeline.logged_stages import METRICS, warn_if_memorised


@pytest.mark.parametrize(
    ("trained", "heldout", "memorised"),
    # far is more than 1 nat and more than half of the training loss
    [(0.5, 1.4, False), (0.5, 1.6, True), (4.0, 5.9, False), (4.0, 6.1, True), (3.0, 2.0, False)],
)
def test_a_held_out_loss_far_above_that_of_the_training_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trained: float, heldout: float, memorised: bool
) -> None:
    losses = [9.0, trained - 0.1, trained, trained + 0.1]
    rows = [{"metrics": {"loss": loss}, "step": step, "time": 0} for step, loss in enumerate(losses)]
    rows.append({"metrics": {"accuracy": 1.0}, "step": 4, "time": 0})
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pd.DataFrame(
        {"step": [0, 4, 4], "quantity": ["heldout_ce", "heldout_ce", "kl"], "value": [9.0, heldout, 9.0]}
    )
    warn_if_memorised(tmp_path, table)
    message = f"its loss is {heldout:.2f} nats per token on held-out text and {trained:.2f} in training"
    assert (message in caplog.text) == memorised


def test_nothing_is_said_of_a_base_whose_training_or_loss_is_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_memorised(tmp_path, pd.DataFrame({"step": [0], "quantity": ["heldout_ce"], "value": [9.0]}))
    (tmp_path / METRICS).write_text('{"metrics": {"loss": 1.0}, "step": 1, "time": 0}\n')
    warn_if_memorised(tmp_path, pd.DataFrame({"step": [0], "quantity": ["ratio"], "value": [9.0]}))
    assert not caplog.text
