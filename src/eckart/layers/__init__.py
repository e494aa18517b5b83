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
from eckart.layers.embedding import FactoredEmbedding, PivotedEmbedding, Table, TiedEmbedding, TiedHead, TiedLayer
from eckart.layers.experts import FactoredExperts
from eckart.layers.group_sparse import GroupSparseInt4
from eckart.layers.linear import FactoredLinear, PivotedLinear, forget_mark, is_narrowed
from eckart.layers.narrow import NarrowColumns, NarrowRows, narrow_layer, widened
from eckart.layers.quantise import quantise_layer
from eckart.layers.quantised import PACKED_BITS, Quantised, QuantisedEmbedding, QuantisedLinear
from eckart.layers.random_features import SNNKLinear
from eckart.layers.sparse import SparseLinear
from eckart.layers.vector_coded import LR2VQConv2d, LR2VQLinear, VectorCoded

__all__ = [
    "FACTORED",
    "PACKED_BITS",
    "FactoredConv",
    "FactoredEmbedding",
    "FactoredExperts",
    "FactoredLinear",
    "GroupSparseInt4",
    "LR2VQConv2d",
    "LR2VQLinear",
    "NarrowColumns",
    "NarrowRows",
    "PivotedConv",
    "PivotedEmbedding",
    "PivotedLinear",
    "Quantised",
    "QuantisedEmbedding",
    "QuantisedLinear",
    "SNNKLinear",
    "SparseLinear",
    "Table",
    "TiedEmbedding",
    "TiedHead",
    "TiedLayer",
    "VectorCoded",
    "dense_keys",
    "describe",
    "forget_mark",
    "is_factored",
    "is_narrowed",
    "layer_from_forms",
    "layer_skeleton",
    "narrow_layer",
    "quantise_layer",
    "supported_forms",
    "tie_to",
    "unsupported",
    "widened",
]
