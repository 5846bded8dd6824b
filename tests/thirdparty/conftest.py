"""Marks all tests of this folder; the packages' own warnings are theirs, ours stay errors."""

from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.thirdparty)
            item.add_marker(
                pytest.mark.filterwarnings("ignore", "error:.*RankQuantization.*", "error:.*[Ll]ightning_accel.*")
            )
