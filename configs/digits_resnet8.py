"""ResNet-8 on scikit-learn's digits, full batch: the default, made for a laptop.

nlcg-train --config=digits_resnet8 --workdir=runs/digits

Needs: nothing but a CPU and some minutes; the images come with scikit-learn.

Result (jax 0.10.2, one CPU core, seed 0): by nlcg_auto, which has no learning rate,
97.2 or 97.8% of the test images are right after ten steps of 60 (two processors, which
round differently), and 99.2% at the end. Between them single evaluations fall, to 91.1%
at step 25 on one of them.

Beside it are drawn runs of tuned Muon and SGD with momentum 0.9, whose files
digits_resnet8_muon.jsonl and digits_resnet8_momentum.jsonl begin with the command that
made them (and nlcg_optax.training.comparison.record made the file of its folder). They
have 90.0% and 85.3% after ten steps, and 98.6% and 98.3% at the end: what is gained is
the first half of the run, not its end. A step of nlcg_auto takes 2.15 times the
operations of one of SGD's, as the summary says.

Both were tuned for their end, by the accuracy on 288 held-out training images (a
stratified fifth, dataset.validation_fraction=0.2) of seed 0, with five steps of warm-up
and a cosine, and the loss where two are equal:

    Muon, momentum 0.95      0.01    0.02    0.04
    accuracy                 0.9930  0.9930  0.9791
    loss                     0.095   0.065   0.079

    Muon, momentum 0.8       0.02    0.04
    accuracy                 0.9895  0.9861

    momentum     0.05    0.1     0.2     0.4     0.8     1.6     3.2
    accuracy     0.9547  0.9686  0.9791  0.9861  0.9895  0.9930  0.9652
"""

from nlcg_optax.training.config import base_config


def get_config():
    """1,437 real 8×8 images in one batch, 60 steps, and no learning rate."""
    config = base_config()
    config.model.name = "resnet8"
    config.dataset.name = "digits"
    config.dataset.crop_padding = 1
    config.dataset.flip = False  # a mirrored digit is another sign
    config.batch_size = 0  # all of them
    config.num_epochs = 60.0
    config.optimizer.name = "nlcg_auto"
    config.optimizer.learning_rate = None
    config.schedule.name = "none"
    config.eval_every_epochs = 5.0
    config.checkpoint_every_epochs = 10.0
    config.compare_with = "digits_resnet8_muon, digits_resnet8_momentum"
    return config
