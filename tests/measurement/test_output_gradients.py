"""Gradients of what matters of an output."""

from dataclasses import dataclass

import pytest
import torch
import transformers

import alds_fast as alds
from alds_fast.errors import ArgumentError, ModelError
from alds_fast.measurement import backward_from, output_gradients


@pytest.mark.parametrize("part", [1, 20, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_is_the_gradient_of_the_roots_of_probabilities(monkeypatch, part, dtype):
    monkeypatch.setattr(output_gradients, "_PART", part)
    values = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    closed, taken = (values.clone().requires_grad_() for _ in "12")
    signs = []
    monkeypatch.setattr(
        output_gradients,
        "_signs",
        lambda like, g: signs.append(torch.randn(like.shape, generator=g)) or signs[-1].clone(),
    )
    energy = backward_from({"logits": closed.transpose(0, 1)}, None, "kl", torch.Generator().manual_seed(1))
    drawn = torch.cat(signs).view(3, 2, 7)
    (drawn * taken.transpose(0, 1).float().softmax(-1).sqrt()).sum().backward()
    assert torch.allclose(closed.grad, taken.grad, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert energy == pytest.approx(6, rel=1e-5)


def test_the_first_tensor_of_a_dataclass_matters():
    @dataclass
    class Output:
        count: int
        parts: list

    z = torch.ones(2, 3, requires_grad=True)
    energy = backward_from(Output(3, [torch.ones(2, dtype=torch.int64), z]), None, True, torch.Generator())
    assert energy == 6 and torch.equal(z.grad.abs(), torch.ones(2, 3))


def test_kl_needs_logits():
    with pytest.raises(ModelError, match="needs an output of logits; of the str .* no floating-point tensor"):
        backward_from("text", None, "kl", torch.Generator())
    loss, z = torch.ones((), requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ModelError, match="the first value is a number, as a loss is; pass batches without labels"):
        backward_from((loss, None), None, "kl", torch.Generator())
    for output in ({"loss": loss, "logits": z}, (loss, z)):
        z.grad = None
        assert backward_from(output, None, "kl", torch.Generator()) == pytest.approx(2)
        assert z.grad is not None and loss.grad is None


def test_a_loss_beside_other_outputs_is_not_what_matters_unless_it_is_named():
    def gradient(sensitivity):
        loss, z = torch.ones((), requires_grad=True), torch.zeros(2, 3, requires_grad=True)
        backward_from((loss, z), None, sensitivity, torch.Generator())
        return loss.grad, z.grad

    assert gradient(True)[0] is None and torch.equal(gradient(True)[1].abs(), torch.ones(2, 3))
    assert gradient(lambda output, batch: output[0])[0] == 1


def test_labels_in_a_batch_change_no_plan():
    """Transformers then return a loss before the logits."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(32, (16, 8), generator=torch.Generator().manual_seed(0))
    for sensitivity in (True, "kl"):
        with_labels, without = (
            alds.analyze(model, data=[{"input_ids": ids, **more}], sensitivity=sensitivity).plan(params=0.8)
            for more in ({"labels": ids}, {})
        )
        assert with_labels == without
    with pytest.raises(ArgumentError, match=r"where this is labels, pass \[ids for ids, labels in loader\]"):
        alds.analyze(model, data=[(ids, ids)])
