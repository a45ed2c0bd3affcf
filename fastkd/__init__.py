"""Knowledge distillation losses in the fewest passes the hardware allows, and exact."""

from ._dispatch import explain
from ._workspace import set_workspace
from .inputs import Expected, Head, TopK
from .losses.attention import AttentionKLLoss, MiniLMLoss, attention_kl_loss, minilm_loss
from .losses.decoupled import dkd_loss, nkd_loss
from .losses.dist import dist_loss
from .losses.feature import attention_transfer_loss, hint_loss, nst_loss
from .losses.logit import KDLoss, LossParts, cross_entropy, kd_loss
from .losses.modules import Adapter, FeatureLoss
from .losses.pairwise import pairwise_cosine, pairwise_distance
from .losses.relation import cka_loss, cosine_relation_loss, gram_loss, prepare_teacher, similarity_preserving_loss
from .losses.rkd import rkd_angle_loss, rkd_distance_loss
from .losses.similarity import correlation_congruence_loss, pkt_loss
from .losses.wsld import wsld_loss, wsld_weights

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AttentionKLLoss",
    "Expected",
    "FeatureLoss",
    "Head",
    "KDLoss",
    "LossParts",
    "MiniLMLoss",
    "TopK",
    "attention_kl_loss",
    "attention_transfer_loss",
    "cka_loss",
    "correlation_congruence_loss",
    "cosine_relation_loss",
    "cross_entropy",
    "dist_loss",
    "dkd_loss",
    "explain",
    "gram_loss",
    "hint_loss",
    "kd_loss",
    "minilm_loss",
    "nkd_loss",
    "nst_loss",
    "pairwise_cosine",
    "pairwise_distance",
    "pkt_loss",
    "prepare_teacher",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "set_workspace",
    "similarity_preserving_loss",
    "wsld_loss",
    "wsld_weights",
]
