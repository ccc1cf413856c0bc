"""ResNet-50 v1.5 on ImageNet, 90 epochs at batch 65,536 (arXiv:1812.02886).

nlcg-train --config=imagenet_resnet50 --workdir=runs/imagenet

Needs: imagenet2012 of TFDS (its files downloaded by hand), and a pod: docs/scaling.md.

The paper does not publish all of this recipe: rate, boundaries and penalty are those of
the usual 90-epoch ResNet-50 training, with the paper's linear rule for the rate.

Result: not measured here (it needs the data set, and a pod's memory for the batch).
"""

from nlcg_optax.training.config import base_config


def get_config():
    """90 epochs of 224×224 crops, streamed."""
    config = base_config()
    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.batch_norm_momentum = 0.9
    config.model.batch_norm_epsilon = 1e-5
    config.dataset.name = "imagenet2012"
    config.dataset.image_size = 224
    config.dataset.in_memory = "no"
    config.dataset.normalization = "imagenet"
    config.batch_size = 65536
    config.eval_batch_size = 2048
    config.num_epochs = 90.0
    config.optimizer.name = "nlcg_paper"
    config.optimizer.learning_rate = 0.1 * 65536 / 256
    config.schedule.name = "step"
    config.schedule.warmup_epochs = 10.0
    config.schedule.warmup_power = 0.5
    config.schedule.warmup_init = 256 / 65536
    config.schedule.boundaries = (30, 60, 80)
    config.l2_penalty = 1e-4
    config.average_decay = 0.9999
    return config
