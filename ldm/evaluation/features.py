"""What a feature network sees in images, as the metrics take it; defined beside the networks, which come first."""

from ldm.models.features import FeatureNetwork, Features

__all__ = ["FeatureNetwork", "Features"]
