"""Resize, crop and normalise (the function that the model runs) against the official transform."""

import numpy as np
import pytest

from tests.shared import golden_path, needs_golden
from xclip_lab.preprocess import normalise, preprocess


@needs_golden("preprocess.npz")
@pytest.mark.parametrize("case", range(6))
def test_official_transform(case):
    golden = np.load(golden_path("preprocess.npz"))
    image = golden[f"preprocess/{case}/image_uint8_rgb"]
    ours = normalise(preprocess(image[None], 32))[0]
    np.testing.assert_allclose(ours.numpy(), golden[f"preprocess/{case}/size32"], atol=1e-6)
