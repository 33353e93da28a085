"""Which cases the GPU suite times: convolutions of a ResNet-50, linear layers of a ViT-B and a Llama-7B."""

from __future__ import annotations

from alds_fast.bench import Operation


def _conv3x3() -> list[Operation]:
    cases = []
    table = [  # size, channels, q of about 2x and of a lower rank, {q: {batch: what the design expects}}
        (56, 64, (32, 16), {32: {32: (1.35, 1.4), 128: (1.4, 1.5)}, 16: {32: (1.6, 1.4), 128: (1.7, 1.5)}}),
        (28, 128, (64, 32), {64: {32: (1.5, 1.3), 128: (1.5, 1.3)}, 32: {32: (2.0, 1.35), 128: (2.0, 1.35)}}),
        (14, 256, (128, 64), {64: {128: (2.0, 1.3)}}),
        (7, 512, (256, 128), {128: {32: (1.6, 1.0), 128: (2.0, 1.0)}}),
    ]
    for size, c, ranks, aims in table:
        for batch in (32, 128, 1):
            for q in ranks:
                options = {"priority": 0 if batch > 1 else 1, "aim": aims.get(q, {}).get(batch)}
                options["compiled"] = batch == 32 and q == ranks[0]
                cases.append(Operation("conv3x3", c, c, q, batch=batch, size=size, **options))
    sliced = [(64, 56, 32, 2), (64, 56, 64, 4), (128, 28, 128, 4), (128, 28, 192, 4), (256, 14, 256, 4)]
    for c, size, q, groups in sliced:
        cases += [Operation("conv3x3", c, c, q, batch=b, size=size, groups=groups) for b in (32, 128)]
    return cases + [Operation("conv3x3", 64, 64, 16, batch=b, size=56, scheme=3, priority=2) for b in (32, 128)]


def _conv1x1() -> list[Operation]:
    table = [(64, 256, 56, (32, 16)), (256, 64, 56, (32, 16)), (512, 128, 28, (48, 32)), (1024, 256, 14, (96, 64))]
    return [
        Operation("conv1x1", c, f, q, batch=b, size=size, priority=i + (b == 1), compiled=(b, i, c) == (32, 0, 64))
        for c, f, size, ranks in table for b in (32, 128, 1) for i, q in enumerate(ranks)
    ]  # fmt: skip


def _linears() -> list[Operation]:
    tokens = 197 * 128
    table = [  # channels, filters, q of 2x and of a lower rank, rows, bias
        (768, 3072, (304, 128), (1, 16, tokens, 4, 2048), True),
        (3072, 768, (304, 128), (1, 16, tokens, 4, 2048), True),
        (768, 768, (192, 96), (1, 16, tokens, 4, 2048), True),
        (4096, 4096, (1024, 512), (1, 16, 2048, 4), False),
        (4096, 11008, (1488, 736), (1, 16, 2048, 4), False),
        (11008, 4096, (1488, 736), (1, 16, 2048, 4), False),
    ]
    decode = (1.5, 1.12)
    aims = {(768, 3072, 128, tokens): (2.4, 1.05), (4096, 4096, 1024, 2048): (1.6, 0.98)}
    aims |= {(4096, 4096, 1024, m): decode for m in (1, 4, 16)}
    chosen = [(768, 3072, 304, tokens), (4096, 4096, 1024, 1)]
    cases = []
    for c, f, ranks, rows, bias in table:
        for q, m in ((q, m) for q in ranks for m in rows):
            place = (c, f, q, m)
            urgent = 0 if place in aims or (q == ranks[0] and m != 4) else 1
            options = {"bias": bias, "priority": urgent, "aim": aims.get(place), "compiled": place in chosen}
            cases.append(Operation("linear", c, f, q, rows=m, **options))
    return cases


def _qkv() -> list[Operation]:
    aims = {4096: (1.7, 1.4)}
    return [
        Operation("qkv", c, c, q, rows=m, bias=c == 768, priority=0, aim=aims.get(c), compiled=m == 1 and c == 4096)
        for c, q in ((4096, 1024), (768, 192)) for m in (1, 4, 16)
    ]  # fmt: skip


def all_cases() -> list[Operation]:
    """Every case, the most telling ones first."""
    return sorted([*_conv3x3(), *_qkv(), *_linears(), *_conv1x1()], key=lambda case: case.priority)


def quick_cases(cuda: bool) -> list[Operation]:
    """Tiny ones of every kind."""
    dtype = "bfloat16" if cuda else "float32"
    return [
        Operation("conv3x3", 16, 16, 8, batch=1, size=6, dtype=dtype, compiled=True),
        Operation("conv3x3", 16, 16, 16, batch=1, size=6, groups=4, dtype=dtype),
        Operation("conv3x3", 16, 16, 16, batch=1, size=6, scheme=3, dtype=dtype),
        Operation("conv1x1", 16, 32, 5, batch=1, size=6, dtype=dtype),
        Operation("linear", 32, 48, 9, rows=1, bias=True, dtype=dtype),
        Operation("linear", 32, 48, 9, rows=20, bias=True),
        Operation("qkv", 32, 32, 8, rows=2, bias=True, dtype=dtype),
    ]
