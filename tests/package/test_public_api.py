"""The public names, their signatures and their documentation; what an import needs and does."""

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import alds_fast as alds
from alds_fast import errors, kernels

NAMES = {
    *("AldsError", "Analysis", "DeployTable", "Evaluation", "LayerPlan", "Plan", "Retrained"),
    *("CompressedCheckpoint", "compress_checkpoint", "from_pretrained"),
    *("analyze", "compress", "deploy", "evaluate", "load", "open_experts", "register", "retrain", "save", "to_plain"),
    *("tune", "TuningTable"),
    *("filter_threshold", "plot_plan", "plot_sweep", "Sweep", "refine", "Refined", "distill", "Distilled", "own_text"),
    *("measured_importance", "load_analysis", "save_analysis", "report", "Report", "benchmark", "Benchmark"),
    *("LowRankConv1d", "LowRankConv2d", "LowRankConv3d", "LowRankLinear"),
    *("LowRankConvTranspose1d", "LowRankConvTranspose2d", "LowRankConvTranspose3d"),
    *("LowRankEmbedding", "LowRankEmbeddingBag", "Int8LowRankLinear", "QuantizeTable", "quantize_factors"),
}


def test_names():
    assert set(alds.__all__) == NAMES and len(alds.__all__) == len(NAMES)
    assert set(dir(alds)) == NAMES | {"__version__"}


def _keywords(function):
    return {n: p.default for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def test_signatures():
    seeing = {
        "data": None,
        "sensitivity": False,
        "mask": "attention_mask",
        "moment_order": 8192,
        "held_out": 1 / 8,
        "moment_memory": None,
    }
    folds = {"schemes": (0, 1, 2, 3), "groups": "divisors", "include": None, "exclude": None}
    running = {"precision": "float64", "progress": None, "example_inputs": None}
    assert _keywords(alds.analyze) == {**folds, **seeing, **running}
    planning = {"criterion": None, "p": None, "method": "alds", "align": 1, "cache": None}
    planning |= {
        "bias_correction": True,
        "importance": None,
        "pivots": True,
        "pins": None,
        "min_rank": 1,
        "hidden_units": False,
        "progress": None,
    }
    budgets = dict.fromkeys(("params", "flops", "memory", "latency", "error", "quality", "evaluate", "example_inputs"))
    assert _keywords(alds.Analysis.plan) == {**budgets, **planning}
    assert _keywords(alds.compress) == {**budgets, "refit": False, "refine": False, "blocks": None}
    assert _keywords(alds.deploy) == {
        "backend": None,
        "table": None,
        "rounds": 7,
        "report": False,
        "reorder": False,
        "tune": None,
        "progress": None,
    }
    recipe = dict.fromkeys(("loader", "loss", "train_step", "optimizer", "scheduler", "train"))
    distillation = {"distill": 0.0, "temperature": 2.0, "distill_loss": None}
    required = dict.fromkeys(("keep", "epochs"), inspect.Parameter.empty)
    retraining = {"cycles": 1, "epochs_retrain": None, "compress": None, "checkpoint": None, "log": None}
    assert _keywords(alds.retrain) == {**required, **retraining, **recipe, **distillation}
    evaluating = dict.fromkeys(("variants", "example_inputs", "data", "after", "out", "progress"))
    evaluating |= {"budgets": (0.5, 0.3), "budget": "params", "seeds": (0,), "workers": 1}
    evaluating |= {"methods": ("alds",), "criteria": (None,), "ps": (None,)}
    assert _keywords(alds.evaluate) == evaluating
    common = {"groups": 1, "activation": None, "residual": None, "backend": "auto"}
    assert _keywords(kernels.lowrank_linear) == {**common, "order": None, "scales": None}
    assert _keywords(kernels.lowrank_linears) == {"scales": None, "backend": "auto"}
    assert _keywords(alds.quantize_factors) == {"report": False}
    assert _keywords(kernels.lowrank_conv2d) == {**common, "stride": 1, "padding": 0, "dilation": 1}
    assert _keywords(alds.Plan.apply) == {
        "blocks": None,
        "moments": None,
        "refit": None,
        "refine": None,
        "epochs": 3,
        "mask": "attention_mask",
        "example_inputs": None,
        "progress": None,
    }


def test_plan_attributes():
    for name in ("layers", "error", "gap", "params", "criterion", "method", "latency"):
        assert name in alds.Plan.__dataclass_fields__ or isinstance(getattr(alds.Plan, name), property)
    for name in ("name", "scheme", "groups", "rank", "error", "params_before", "params_after", "reason"):
        assert name in alds.LayerPlan.__dataclass_fields__


def test_evaluation_attributes():
    for name in ("rows", "budget", "variants", "shares", "final"):
        assert name in alds.Evaluation.__dataclass_fields__ or isinstance(getattr(alds.Evaluation, name), property)
    for name in ("summary", "best", "largest_reduction", "to_csv", "to_json", "to_markdown", "plot", "save", "read"):
        assert callable(getattr(alds.Evaluation, name))


def test_every_public_name_is_documented():
    for name in alds.__all__:
        thing = getattr(alds, name)
        assert inspect.getdoc(thing), name
        for method, value in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(value) and not method.startswith("_") and method not in ("forward", "extra_repr"):
                assert inspect.getdoc(value), f"{name}.{method}"


def test_types_can_be_looked_up_at_run_time():
    for name in ("compress", "analyze", "deploy", "compress_checkpoint", "evaluate", "report"):
        assert "return" in typing.get_type_hints(getattr(alds, name))


def test_every_error_is_an_alds_error():
    kinds = [v for v in vars(errors).values() if inspect.isclass(v)]
    assert all(issubclass(k, alds.AldsError) for k in kinds) and issubclass(errors.BudgetError, ValueError)


def _python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_without_torch_says_what_to_install():
    result = _python("import sys; sys.modules['torch'] = None; import alds_fast")
    assert result.returncode == 1
    assert (
        "ImportError: alds_fast needs PyTorch, which is not installed: pip install 'torch>=2.11,<2.14'" in result.stderr
    )


@pytest.mark.slow
def test_import_touches_no_gpu_and_prints_nothing():
    code = "import alds_fast, torch, sys; assert not torch.cuda.is_initialized(); print('matplotlib' in sys.modules)"
    result = _python(code)
    assert result.returncode == 0 and result.stdout.strip() == "False" and result.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--help", "compress --help"])
def test_command_line_is_installed(flag):
    script = Path(sys.executable).parent / "alds-fast"
    result = subprocess.run([script, *flag.split()], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "usage: alds-fast" in result.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads are not kept")
@pytest.mark.parametrize(
    ("function", "returned"),
    [
        (alds.deploy, ["nn.Module", "tuple[nn.Module, DeployTable]"]),
        (alds.from_pretrained, ["tuple[PreTrainedModel, dict[str, Any]]", "Class", "PreTrainedModel"]),
    ],
)
def test_editors_are_told_what_comes_back(function, returned):
    overloads = [inspect.signature(overload) for overload in typing.get_overloads(function)]
    assert [overload.return_annotation for overload in overloads] == returned
    names = inspect.signature(function).parameters.keys()
    assert all(overload.parameters.keys() - {"output_loading_info"} == names for overload in overloads)
