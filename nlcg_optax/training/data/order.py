"""The order of the examples: a function of the seed and the step alone."""

import functools

import numpy as np


@functools.lru_cache(maxsize=8)
def permutation(epoch: int, num_examples: int, seed: int) -> np.ndarray:
    """What :func:`epoch_indices` copies: not to be written to."""
    permutation = np.random.default_rng([seed, epoch]).permutation(num_examples)
    permutation.flags.writeable = False
    return permutation


def epoch_indices(epoch: int, num_examples: int, seed: int) -> np.ndarray:
    """The order of the examples in an epoch (from 0), int32 [N], also by the seed."""
    return permutation(int(epoch), int(num_examples), int(seed)).astype(np.int32)


def batch_indices(
    step: int, batch_size: int, num_examples: int, seed: int
) -> np.ndarray:
    """The examples of a training step.

    The epochs' permutations follow on each other without a gap, and step k has the
    positions [kB, (k + 1)B) of that sequence: every example comes once an epoch, none
    is dropped, and a batch may straddle two epochs.

    Returns:
      The indices, int32 [B], a function of the arguments alone.

    Raises:
      ValueError: if the batch size B is not in [1, N] or the step k is negative.

    Example:
      >>> [batch_indices(step, 2, 3, seed=0).tolist() for step in range(3)]
      [[2, 0], [1, 2], [0, 1]]
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"the batch size must lie between 1 and the number of training examples, "
            f"{num_examples}, and is {batch_size}"
        )
    if step < 0:
        raise ValueError(f"the step must not be negative, and is {step}")
    epoch, offset = divmod(int(step) * batch_size, num_examples)
    indices = epoch_indices(epoch, num_examples, seed)[offset : offset + batch_size]
    if len(indices) < batch_size:
        rest = epoch_indices(epoch + 1, num_examples, seed)[: batch_size - len(indices)]
        indices = np.concatenate([indices, rest])
    return indices
