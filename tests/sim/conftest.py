"""Worker processes for all simulations: two at once, and without type checks on every call."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="session")
def workers():
    """Runs functions of tests.sim modules elsewhere; there the types are not checked."""
    count = min(4, os.cpu_count() or 1)
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
