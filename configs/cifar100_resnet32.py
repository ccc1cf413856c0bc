"""ResNet-32 on CIFAR-100 by the recipe of arXiv:1812.02886, at batch 4,096.

nlcg-train --config=cifar100_resnet32 --workdir=runs/cifar100

Needs: cifar100 of TFDS (downloaded by the first run), and an accelerator.

Result: not measured here (it needs the data set, and an accelerator).
"""

from nlcg_optax.training.config import load_config


def get_config():
    """That of CIFAR-10, with the other data set."""
    config = load_config("cifar10_resnet32")
    config.dataset.name = "cifar100"
    return config
