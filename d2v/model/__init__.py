"""The data2vec 2.0 model: one shared encoder, three front ends, one convolutional decoder."""

from .data2vec import Data2Vec, Features, PretrainOutput

__all__ = ["Data2Vec", "Features", "PretrainOutput"]
