"""A compressed model measured against its original, and what was predicted beside what was measured."""

from eckart.evaluation.bootstrap import bootstrap, resample
from eckart.evaluation.certify import Certificate, LayerWarning, certify, layer_warnings
from eckart.evaluation.embeddings import evaluate_embeddings
from eckart.evaluation.language import evaluate_causal, evaluate_logits, evaluate_masked
from eckart.evaluation.latency import measure_latency
from eckart.evaluation.measured import Forward, Measured, disk_bytes, finish

__all__ = [
    "Certificate",
    "Forward",
    "LayerWarning",
    "Measured",
    "bootstrap",
    "certify",
    "disk_bytes",
    "evaluate_causal",
    "evaluate_embeddings",
    "evaluate_logits",
    "evaluate_masked",
    "finish",
    "layer_warnings",
    "measure_latency",
    "resample",
]
