"""nn.Modules around forms: drop-in layers whose factors are ordinary children."""

from eckart.layers.build import (
    FACTORED,
    dense_keys,
    describe,
    is_factored,
    layer_from_forms,
    layer_skeleton,
    supported_forms,
    tie_to,
    unsupported,
)
from eckart.layers.conv import FactoredConv, PivotedConv
from eckart.layers.embedding import FactoredEmbedding, PivotedEmbedding, TiedEmbedding, TiedHead, TiedLayer
from eckart.layers.experts import FactoredExperts
from eckart.layers.linear import FactoredLinear, PivotedLinear

__all__ = [
    "FACTORED",
    "FactoredConv",
    "FactoredEmbedding",
    "FactoredExperts",
    "FactoredLinear",
    "PivotedConv",
    "PivotedEmbedding",
    "PivotedLinear",
    "TiedEmbedding",
    "TiedHead",
    "TiedLayer",
    "dense_keys",
    "describe",
    "is_factored",
    "layer_from_forms",
    "layer_skeleton",
    "supported_forms",
    "tie_to",
    "unsupported",
]
