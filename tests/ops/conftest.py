"""Every op test runs over poisoned memory."""

import pytest


@pytest.fixture(autouse=True)
def _poisoned(poison: None) -> None:
    """Use the fixture everywhere in this folder."""
