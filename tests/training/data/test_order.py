import numpy as np
import pytest

from nlcg_optax.training import data


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
def test_every_example_comes_once_an_epoch(batch_size):
    num_examples = 10
    batches = [
        data.batch_indices(step, batch_size, num_examples, seed=5)
        for step in range(3 * num_examples)
    ]
    assert {(b.dtype, b.shape) for b in batches} == {
        (np.dtype(np.int32), (batch_size,))
    }
    sequence = np.concatenate(batches)
    epochs = sequence[: len(sequence) // num_examples * num_examples]
    for epoch, order in enumerate(epochs.reshape(-1, num_examples)):
        expected = np.random.default_rng([5, epoch]).permutation(num_examples)
        np.testing.assert_array_equal(order, expected)
        np.testing.assert_array_equal(
            order, data.epoch_indices(epoch, num_examples, seed=5)
        )


def test_batch_straddles_two_epochs():
    batch = data.batch_indices(2, 4, 10, seed=0)
    assert batch[:2].tolist() == data.epoch_indices(0, 10, 0)[8:].tolist()
    assert batch[2:].tolist() == data.epoch_indices(1, 10, 0)[:2].tolist()


def test_batch_does_not_depend_on_what_came_before():
    expected = data.batch_indices(7, 4, 10, seed=0)
    expected_copy = expected.copy()
    expected[:] = -1
    for step in range(20):
        data.batch_indices(step, 4, 10, seed=0)
    again = data.batch_indices(7, 4, 10, seed=0)
    np.testing.assert_array_equal(again, expected_copy)
    assert not np.array_equal(again, data.batch_indices(7, 4, 10, seed=1))


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batch_size_must_fit(batch_size):
    with pytest.raises(ValueError, match=f"1 and .* 10, and is {batch_size}"):
        data.batch_indices(0, batch_size, 10, seed=0)
    split = data.Split.from_arrays(np.zeros((10, 2, 2, 3)), np.zeros(10))
    with pytest.raises(ValueError, match=f"10, and is {batch_size}"):
        data.stream(split, batch_size=batch_size)


def test_step_must_not_be_negative():
    with pytest.raises(ValueError, match="step must not be negative, and is -1"):
        data.batch_indices(-1, 2, 10, seed=0)
    split = data.Split.from_arrays(np.zeros((10, 2, 2, 3)), np.zeros(10))
    with pytest.raises(ValueError, match="step must not be negative, and is -1"):
        data.stream(split, batch_size=2, start_step=-1)
