"""β rules: pure functions of inner products, by name in ``BETA_RULES``."""

from nlcg_optax.directions.beta import (
    BETA_RULES,
    BetaRule,
    InnerProducts,
    dai_kou,
    dai_yuan,
    fletcher_reeves,
    hager_zhang,
    hestenes_stiefel,
    hybrid_hs_dy,
    liu_storey,
    polak_ribiere,
)

__all__ = [
    "BETA_RULES",
    "BetaRule",
    "InnerProducts",
    "dai_kou",
    "dai_yuan",
    "fletcher_reeves",
    "hager_zhang",
    "hestenes_stiefel",
    "hybrid_hs_dy",
    "liu_storey",
    "polak_ribiere",
]
