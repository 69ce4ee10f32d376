"""Training a classifier: data, recipe, loop, checkpoints, and the network afterwards.

`fusedres train`, `evaluate` and `predict` are thin on top of it. Needs the extra "train":
pip install "fusedres[train]".
"""

from fusedres.training.checkpoint import Checkpoint, Network
from fusedres.training.classifier import Classifier, Prediction
from fusedres.training.data import Data, Failure, find_pictures, load
from fusedres.training.files import CheckpointError, DataError, TrainingError
from fusedres.training.preprocess import Preprocess
from fusedres.training.recipe import Recipe
from fusedres.training.result import Result
from fusedres.training.run import resume, train
from fusedres.training.trainer import Epoch, Evaluation, Trainer, evaluate

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Classifier",
    "Data",
    "DataError",
    "Epoch",
    "Evaluation",
    "Failure",
    "Network",
    "Prediction",
    "Preprocess",
    "Recipe",
    "Result",
    "Trainer",
    "TrainingError",
    "evaluate",
    "find_pictures",
    "load",
    "resume",
    "train",
]
