"""Tests that share something dear are run by one worker: else each worker makes it anew, and nobody sees why it is slow."""

from __future__ import annotations

import os

import pytest


@pytest.mark.xdist_group("together")
def test_a_group_has_a_name_that_the_scheduler_reads(request: pytest.FixtureRequest) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("runs in one process")
    assert request.node.nodeid.endswith("@together"), request.node.nodeid
