"""What every test begins with: the same random numbers whatever ran before it, and the same examples of properties.

`pytest --hypothesis-profile default --hypothesis-seed N` looks for new examples.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.load_profile("ci")  # hypothesis' own: chosen by the test's name, and no limits by the clock


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
