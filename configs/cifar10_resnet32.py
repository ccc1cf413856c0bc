"""ResNet-32 on CIFAR-10 by the recipe of arXiv:1812.02886, at batch 4,096.

nlcg-train --config=cifar10_resnet32 --workdir=runs/cifar10

Needs: cifar10 of TFDS (downloaded by the first run), and an accelerator.

Result: not measured here (it needs the data set, and an accelerator).
"""

from nlcg_optax.training.config import base_config


def get_config():
    """200 epochs; the rate is divided by 10 at epochs 102 and 153."""
    config = base_config()
    config.model.name = "resnet32"
    config.model.batch_norm_momentum = 0.99
    config.model.batch_norm_epsilon = 1e-5
    config.dataset.name = "cifar10"
    config.dataset.crop_padding = 4
    config.dataset.flip = True
    config.batch_size = 4096
    config.num_epochs = 200.0
    config.optimizer.name = "nlcg_paper"
    # The paper's maximal rate: 0.8 at batch 2,048, 1.6 at 4,096.
    config.optimizer.learning_rate = 1.6
    config.schedule.name = "step"
    config.schedule.warmup_epochs = 25.0
    config.schedule.warmup_power = 0.5
    # The initial rate is not published; 0.1 is what its rule gives at batch 256.
    config.schedule.warmup_init = 0.1 / 1.6
    config.schedule.boundaries = (102, 153)
    config.l2_penalty = 2e-4
    config.average_decay = 0.9999
    config.eval_every_epochs = 5.0
    config.checkpoint_every_epochs = 5.0
    return config
