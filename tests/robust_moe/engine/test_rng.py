"""The global generators' states, as they go into a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

from robust_moe.engine.rng import rng_state


@pytest.mark.filterwarnings("ignore:get_state and legacy")
def test_another_generator_of_numpy_is_refused():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        with pytest.raises(RuntimeError, match=r"^NumPy's global generator: expected MT19937, got PCG64$"):
            rng_state()
    finally:
        np.random.set_bit_generator(before)
    assert rng_state()["numpy"][0] == "MT19937"
