import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRIFAST_SLOW_TESTS") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set TRIFAST_SLOW_TESTS=1"))


@pytest.fixture(autouse=True)
def _fresh(compiled_afresh):
    pass
