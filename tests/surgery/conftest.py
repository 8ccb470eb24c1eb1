"""Warnings of other libraries, raised in calls that are none of our business."""

import pytest

THEIR_WARNINGS = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # transformers, called by peft
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",  # transformers
    "ignore:.*Merge lora module to 4-bit linear may get different generations:UserWarning",  # peft
    "ignore:Unmerge result can be inaccurate:UserWarning",  # peft, for IA3
    "ignore:.*Unmerge lora module to 4-bit linear may get different generations:UserWarning",  # peft
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for warning in THEIR_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))
