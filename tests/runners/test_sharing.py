import os

import pytest

from runners.disk import share_with_group


@pytest.mark.parametrize(
    ("mode", "before", "after"),
    [
        (0o2775, 0o022, 0o002),
        (0o2770, 0o027, 0o007),
        (0o2775, 0o002, 0o002),
        (0o2775, 0o077, 0o077),  # this user's files are private
        (0o2755, 0o022, 0o022),  # the group may not write
        (0o775, 0o022, 0o022),  # new files would take the user's own group
    ],
)
def test_the_group_of_a_shared_directory_may_write_what_a_run_makes(tmp_path, mode, before, after):
    tmp_path.chmod(mode)
    kept = os.umask(before)
    try:
        share_with_group(tmp_path / "outputs" / "jobs")
    finally:
        umask = os.umask(kept)
    assert umask == after
