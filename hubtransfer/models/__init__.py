"""Models: a backbone with named tasks, each with a head and a patch; teachers; saving and sharing."""

from hubtransfer.models.cache import OutputCache
from hubtransfer.models.evidence_head import EvidenceHead
from hubtransfer.models.growth import register_growth
from hubtransfer.models.heads import ClassificationHead, DenseHead, HeadConfig, MultiLabelHead, RegressionHead
from hubtransfer.models.inherit import Inherited, initialise_from_teacher
from hubtransfer.models.model import TransferModel
from hubtransfer.models.output import TransferModelOutput
from hubtransfer.models.predict import Prediction
from hubtransfer.models.statistic_heads import NearestMeanHead, RidgeHead
from hubtransfer.models.store import PatchStore
from hubtransfer.models.tasks import TaskSpec
from hubtransfer.models.teacher import Teacher
from hubtransfer.models.towers import stitched_model
from hubtransfer.models.units import linear_chain

__all__ = [
    "ClassificationHead",
    "DenseHead",
    "EvidenceHead",
    "HeadConfig",
    "Inherited",
    "MultiLabelHead",
    "NearestMeanHead",
    "OutputCache",
    "PatchStore",
    "Prediction",
    "RegressionHead",
    "RidgeHead",
    "TaskSpec",
    "Teacher",
    "TransferModel",
    "TransferModelOutput",
    "initialise_from_teacher",
    "linear_chain",
    "register_growth",
    "stitched_model",
]
