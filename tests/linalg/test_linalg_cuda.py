"""The CUDA implementations of the operators against float64; nothing to do without a GPU."""

import pytest
import torch
from support.bands import KINDS, squared_errors, weight

import alds_fast as alds
from alds_fast import linalg
from alds_fast.allocation import float32_check
from alds_fast.linalg import torch_backend
from alds_fast.linalg.torch_backend import batched_rsvd_ref, spectra_ref

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def matrix(kind, *shape):
    torch.manual_seed(0)
    return weight(kind, *shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 60, 80), (1, 4)), ((1, 512, 2304), (1, 2, 8)), ((1, 768, 512), (1, 2))]
)
def test_spectra(kind, shape, groups):
    m = matrix(kind, *shape)
    expected = spectra_ref(m, groups)
    for float32 in (False, True):
        spectra = linalg.spectra([m.cuda()], [groups], float32=float32)[0]
        for values, exact in zip(spectra, expected, strict=True):
            assert values.is_cuda
            if float32:
                assert (squared_errors(values.cpu()) - squared_errors(exact)).abs().max() <= float32_check.TAIL
            else:
                torch.testing.assert_close(values.cpu(), exact, rtol=1e-6, atol=2e-8 * float(exact.max()))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_factors(kind, exact):
    m = matrix(kind, 1, 256, 512)
    for k, rank in ((1, 12), (2, 100), (4, 8)):
        (factors,) = linalg.batched_rsvd([m.cuda()], [k], [rank], exact=exact)
        best = batched_rsvd_ref(m, k, rank)
        limit = (1 + torch_backend.TOLERANCE) * best.error + 1e-12 * best.norm
        assert (factors.error.cpu() <= limit).all()
        slices = m.double().unflatten(2, (k, -1)).transpose(1, 2).flatten(0, 1)
        reached = (slices - (factors.left.cpu().double() @ factors.right.cpu().double())).square().sum((1, 2))
        assert (reached <= limit + 1e-6 * best.norm).all()


def test_a_model_on_the_gpu_gets_the_plan_of_the_cpu():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(16, 64, 3), torch.nn.Conv2d(64, 64, 3), torch.nn.Conv2d(64, 32, 1))
    expected = alds.analyze(net).plan(params=0.5)
    for precision in ("float64", "float32"):
        plan = alds.analyze(net.cuda(), precision=precision).plan(params=0.5)
        assert [row.choice for row in plan.layers] == [row.choice for row in expected.layers]
        small = plan.apply(net)
        assert all(p.is_cuda for p in small.parameters())
