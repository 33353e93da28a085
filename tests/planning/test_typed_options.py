"""What compress says of its options is what analyze and plan say."""

import inspect

import pytest

import alds_fast as alds
from alds_fast.planning.options import AnalysisOptions, CompressOptions, PlanOptions

BUDGETS = {"params", "flops", "memory", "latency", "error", "quality", "evaluate"}


@pytest.mark.parametrize(
    ("typed", "function", "without"),
    [
        (AnalysisOptions, alds.analyze, {"example_inputs"}),
        (PlanOptions, alds.Analysis.plan, BUDGETS | {"example_inputs", "progress"}),
    ],
)
def test_options_have_the_types_of_the_function_that_they_go_to(typed, function, without):
    of_function = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in without
    }
    assert {name: kind.__forward_arg__ for name, kind in typed.__annotations__.items()} == of_function


def test_compress_names_them_for_editors():
    options = inspect.signature(alds.compress).parameters["options"]
    assert options.kind is options.VAR_KEYWORD and options.annotation == "Unpack[CompressOptions]"
    assert CompressOptions.__optional_keys__ == AnalysisOptions.__optional_keys__ | PlanOptions.__optional_keys__
