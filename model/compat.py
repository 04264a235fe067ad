"""Private APIs of dependencies that `model` needs, each with the version it was checked against.

tests/model/test_compat.py fails when one of them disappears.
"""

from typing import Protocol


class FeatureEncoder(Protocol):
    """The convolutions of a wav2vec 2.0 model in transformers."""

    def _freeze_parameters(self) -> None: ...


def freeze_feature_encoder(module: FeatureEncoder) -> None:
    """Freeze the convolutions of a wav2vec 2.0 model and keep them out of the autograd graph (transformers 5.23).

    `requires_grad_(False)` alone would leave the graph: the module marks its input as requiring gradients in training.
    `freeze_feature_encoder` is public on models with a head, but missing on HubertModel.
    """
    module._freeze_parameters()
