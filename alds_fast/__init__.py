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

from .allocation import filter_threshold
from .bench import Benchmark, benchmark
from .checkpoints import (
    CompressedCheckpoint,
    compress_checkpoint,
    from_pretrained,
    load,
    load_analysis,
    save,
    save_analysis,
)
from .deployment import DeployTable, QuantizeTable, TuningTable, deploy, quantize_factors, tune
from .errors import AldsError
from .evaluation import Evaluation, Report, evaluate, measured_importance, report
from .factors import Distilled, Refined, distill, refine
from .integrations import open_experts, to_plain
from .layers import (
    Int8LowRankLinear,
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankEmbedding,
    LowRankEmbeddingBag,
    LowRankLinear,
    register,
)
from .planning import Analysis, LayerPlan, Plan, Sweep, analyze, compress, plot_plan, plot_sweep
from .retraining import Retrained, own_text, retrain
from .version import __version__ as __version__

__all__ = [
    "AldsError",
    "Analysis",
    "Benchmark",
    "CompressedCheckpoint",
    "DeployTable",
    "Distilled",
    "Evaluation",
    "Int8LowRankLinear",
    "LayerPlan",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankEmbeddingBag",
    "LowRankLinear",
    "Plan",
    "QuantizeTable",
    "Refined",
    "Report",
    "Retrained",
    "Sweep",
    "TuningTable",
    "analyze",
    "benchmark",
    "compress",
    "compress_checkpoint",
    "deploy",
    "distill",
    "evaluate",
    "filter_threshold",
    "from_pretrained",
    "load",
    "load_analysis",
    "measured_importance",
    "open_experts",
    "own_text",
    "plot_plan",
    "plot_sweep",
    "quantize_factors",
    "refine",
    "register",
    "report",
    "retrain",
    "save",
    "save_analysis",
    "to_plain",
    "tune",
]


def __dir__() -> list[str]:
    """The public names alone, for completion: rooms of the library stand beside functions of like names."""
    return [*__all__, "__version__"]
