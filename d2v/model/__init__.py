"""The data2vec 2.0 model: one shared encoder, three front ends, one convolutional decoder; and its rivals."""

from ..config.model import ModelConfig
from .data2vec import Data2Vec
from .pretraining import Features, Pretraining, PretrainOutput
from .rivals import Data2Vec1, MaskedAutoencoder, MaskedLM

__all__ = ["Data2Vec", "Features", "PretrainOutput", "Pretraining", "build_model"]

OBJECTIVES: dict[str, type[Pretraining]] = {
    "data2vec2": Data2Vec,
    "data2vec1": Data2Vec1,
    "mae": MaskedAutoencoder,
    "mlm": MaskedLM,
}


def build_model(cfg: ModelConfig) -> Pretraining:
    """A new model for `cfg.objective`."""
    return OBJECTIVES[cfg.objective](cfg)
