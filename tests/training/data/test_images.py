import numpy as np
import pytest

from nlcg_optax.training.data import images


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 200), (200, 2), (7, 5)])
def test_crop_of_an_odd_image_lies_within_it(height, width):
    rng = np.random.default_rng(0)
    for _ in range(50):
        top, left, box_height, box_width = images.random_box(height, width, rng)
        assert box_height >= 1 and 0 <= top <= height - box_height
        assert box_width >= 1 and 0 <= left <= width - box_width
