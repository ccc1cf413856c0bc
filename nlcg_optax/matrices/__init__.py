"""What is a matrix in a tree of parameters, and where its state lies."""

from nlcg_optax.matrices.devices import state_specs
from nlcg_optax.matrices.moving import for_devices
from nlcg_optax.matrices.recognition import equinox, flax, last_axis, recognize

__all__ = ["equinox", "flax", "for_devices", "last_axis", "recognize", "state_specs"]
