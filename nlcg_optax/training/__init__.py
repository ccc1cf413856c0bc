"""Training Flax ResNets with NLCG and its peers (the ``[train]`` extra)."""
