"""Shared fixtures of the conversion tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def alone() -> Iterator:
    """Megatron's groups for this process by itself; gives the settings of `policy.megatron_cfg`."""
    from nrt_megatron.mcore import runtime
    from nrt_megatron.recipe import Recipe

    recipe = Recipe()
    runtime.initialize(recipe)
    yield recipe.policy.megatron_cfg
    runtime.shutdown()
