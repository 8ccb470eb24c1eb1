"""Warnings of other libraries, raised in calls that are none of our business."""

import pytest

from surgery.conftest import THEIR_WARNINGS

WARNINGS = (
    *THEIR_WARNINGS,
    "ignore:.*side effects happened in the model.forward:UserWarning",  # strict export, of DoRA's empty cache
    "ignore:No complete tensor found in the group:UserWarning",  # torch.export.save: shared memory
    "ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning",  # torch's AOTInductor
    "ignore:.*torch.jit.* is deprecated:DeprecationWarning",  # what is tested here is deprecated
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for warning in WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))
