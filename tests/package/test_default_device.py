"""The library works whatever torch's default device is: every tensor that it makes names its device."""

import ast

import pytest
import torch
from support.house import ROOT
from support.models import images, small_net
from torch.utils._device import _device_constructors

import alds_fast as alds

MAKERS = {f.__name__ for f in _device_constructors()}


def _makers_without_device(text):
    """The calls in a source text that make a tensor on the default device."""
    for node in ast.walk(ast.parse(text)):
        function = getattr(node, "func", None)
        if isinstance(function, ast.Attribute) and function.attr in MAKERS:
            of_torch = isinstance(function.value, ast.Name) and function.value.id == "torch"
            if of_torch and not {k.arg for k in node.keywords} & {"device", None}:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_every_tensor_that_the_library_makes_names_its_device():
    files = sorted((ROOT / "alds_fast").rglob("*.py"))
    assert {str(f.relative_to(ROOT)): bad for f in files if (bad := list(_makers_without_device(f.read_text())))} == {}


def test_a_maker_without_a_device_is_noticed():
    assert list(_makers_without_device("x = torch.zeros(3)")) == ["line 1: torch.zeros(3)"]
    assert not list(_makers_without_device("torch.zeros(3, device=d); torch.empty(3, **options); np.zeros(3)"))


@pytest.mark.parametrize(
    "options",
    [
        {"params": 0.5},
        {"flops": 0.5, "example_inputs": images()},
        {"params": 0.5, "criterion": "operator"},
        {"params": 0.5, "method": "pca", "data": [images()], "groups": (1,)},
        {"params": 0.5, "data": [images(16)]},
        {"params": 0.5, "data": [images(16)], "sensitivity": True, "refit": True},
        {"latency": 1.0, "example_inputs": images(), "cache": False, "groups": (1,)},
    ],
    ids=["params", "flops", "operator", "pca", "data", "sensitivity", "latency"],
)
@pytest.mark.filterwarnings("ignore:.*latency:UserWarning")
def test_compressing_under_another_default_device(options):
    model = small_net()
    with torch.device("meta"):
        small = alds.compress(model, **options)
    assert {p.device.type for p in small.parameters()} == {"cpu"}
    assert torch.isfinite(small(images())).all()


def test_saving_loading_and_deploying_under_another_default_device(tmp_path):
    small, x = alds.compress(small_net(), params=0.5), images()[:1]
    with torch.device("meta"):
        alds.save(small, tmp_path / "small.st")
        loaded = alds.load(tmp_path / "small.st", small_net())
        fast = alds.deploy(small, x, rounds=1)
    assert torch.equal(loaded(x), small(x))
    torch.testing.assert_close(fast(x), small(x))
