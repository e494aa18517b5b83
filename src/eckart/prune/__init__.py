"""Removing what is not needed: masks, selectors, refit, schedules, sparse training."""

from eckart.prune.actions import ACTIONS, Action, Fade, Freeze, Prox, Regrow, Shrink, Zero
from eckart.prune.alps import alps
from eckart.prune.cric import CricResult, cric_scores
from eckart.prune.dsl import dynamic_sparse_learning
from eckart.prune.envelope import group_envelope
from eckart.prune.envelope_prox import envelope_prox
from eckart.prune.ftwt import DynamicRouting, RoutingReport
from eckart.prune.global_magnitude import global_mp
from eckart.prune.gradient_flow import GradientFlow, flow_stages
from eckart.prune.gradual import gradual_magnitude
from eckart.prune.groups import GroupSet, Part, chained, find_groups
from eckart.prune.heads import prune_heads
from eckart.prune.hesso import hesso_training
from eckart.prune.iss import iss_p
from eckart.prune.kfac import CostMap, prune_kfac
from eckart.prune.magnitude import magnitude_masks
from eckart.prune.masks import KeepZero, MaskSet, keep_zero
from eckart.prune.mfac import MFACPruned, mfac_prune, mfac_scores, sample_gradients
from eckart.prune.one_shot import PrunedLayer, PruneOutcome, one_shot
from eckart.prune.owl import owl_shares
from eckart.prune.patterns import NofM, Pattern, Row, Runs, Unstructured, Whole, global_masks, parse_pattern
from eckart.prune.quick_selection import QuickSelection
from eckart.prune.refit import corrected_bias, refit
from eckart.prune.rigl import rigl_training
from eckart.prune.schedule import Schedule, SparsityReport
from eckart.prune.selectors import SELECTORS, Selector, View, erk_shares, fixed
from eckart.prune.soups import Soup, recalibrate_batch_norm, soup_phases, sparse_soup
from eckart.prune.sparse_ift import SparseIFT
from eckart.prune.sparse_lowrank import sparse_lowrank
from eckart.prune.sparsegpt import sparsegpt
from eckart.prune.ssvi import Confidence, SparseBayesian, measure_confidence
from eckart.prune.table import PRUNING
from eckart.prune.turbo_vbi import TurboVBI, support_odds
from eckart.prune.wanda import wanda_mask, wanda_scores

__all__ = [
    "ACTIONS",
    "PRUNING",
    "SELECTORS",
    "Action",
    "Confidence",
    "CostMap",
    "CricResult",
    "DynamicRouting",
    "Fade",
    "Freeze",
    "GradientFlow",
    "GroupSet",
    "KeepZero",
    "MFACPruned",
    "MaskSet",
    "NofM",
    "Part",
    "Pattern",
    "Prox",
    "PruneOutcome",
    "PrunedLayer",
    "QuickSelection",
    "Regrow",
    "RoutingReport",
    "Row",
    "Runs",
    "Schedule",
    "Selector",
    "Shrink",
    "Soup",
    "SparseBayesian",
    "SparseIFT",
    "SparsityReport",
    "TurboVBI",
    "Unstructured",
    "View",
    "Whole",
    "Zero",
    "alps",
    "chained",
    "corrected_bias",
    "cric_scores",
    "dynamic_sparse_learning",
    "envelope_prox",
    "erk_shares",
    "find_groups",
    "fixed",
    "flow_stages",
    "global_masks",
    "global_mp",
    "gradual_magnitude",
    "group_envelope",
    "hesso_training",
    "iss_p",
    "keep_zero",
    "magnitude_masks",
    "measure_confidence",
    "mfac_prune",
    "mfac_scores",
    "one_shot",
    "owl_shares",
    "parse_pattern",
    "prune_heads",
    "prune_kfac",
    "recalibrate_batch_norm",
    "refit",
    "rigl_training",
    "sample_gradients",
    "soup_phases",
    "sparse_lowrank",
    "sparse_soup",
    "sparsegpt",
    "support_odds",
    "wanda_mask",
    "wanda_scores",
]
