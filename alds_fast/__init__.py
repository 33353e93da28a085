"""alds_fast: make a PyTorch model smaller by optimal layer-wise low-rank decomposition.

>>> import torch, alds_fast as alds
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
>>> small = alds.compress(model, params=0.5)
>>> sum(p.numel() for p in small.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
True
"""

try:
    import torch  # noqa: F401
except ImportError as e:
    raise ImportError(
        "alds_fast needs PyTorch, which is not installed: pip install 'torch>=2.11,<2.14' "
        "(choose the CPU or CUDA build for your machine)"
    ) from e

from .analysis import Analysis, analyze
from .checkpoint import load, save
from .compression import compress
from .convolution import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .deploy_table import DeployTable
from .deployment import deploy
from .directory import CompressedCheckpoint, compress_checkpoint
from .errors import AldsError
from .evaluation import evaluate
from .layers import LowRankLinear
from .plan import LayerPlan, Plan
from .pretrained import from_pretrained
from .results import Evaluation
from .retraining import Retrained, retrain
from .version import __version__ as __version__

__all__ = [
    "AldsError",
    "Analysis",
    "CompressedCheckpoint",
    "DeployTable",
    "Evaluation",
    "LayerPlan",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLinear",
    "Plan",
    "Retrained",
    "analyze",
    "compress",
    "compress_checkpoint",
    "deploy",
    "evaluate",
    "from_pretrained",
    "load",
    "retrain",
    "save",
]
