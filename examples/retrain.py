"""Train a small network on scikit-learn's digits, compress it, and retrain it: at once and in three cycles.

Needs scikit-learn beside alds_fast; takes under a minute on one core.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import alds_fast as alds


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """8 x 8 images in [0, 1] and their classes, three quarters to train on and a quarter to test on."""
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x, y = images.float().view(-1, 1, 8, 8)[order] / 16, labels[order]
    cut = 3 * len(x) // 4
    return TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])


@torch.inference_mode()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    return (model.eval()(x).argmax(1) == y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.15)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--retrain", type=int, default=6, help="epochs of each retraining, at most --epochs")
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the dense model's outputs, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="directory for the runs' states; a killed run goes on from there")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    train, test = digits(args.seed)
    loader = DataLoader(train, 64, shuffle=True)

    def optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    begin = time.perf_counter()
    dense = network()
    optimiser = optimizer(dense)
    rates = scheduler(optimiser)
    for _ in range(args.epochs):
        for x, y in loader:
            optimiser.zero_grad()
            nn.functional.cross_entropy(dense(x), y).backward()
            optimiser.step()
        rates.step()

    def retrained(name, cycles):
        return alds.retrain(
            dense, keep=args.keep, cycles=cycles, epochs=args.epochs, epochs_retrain=args.retrain, loader=loader,
            loss=nn.functional.cross_entropy, optimizer=optimizer, scheduler=scheduler, distill=args.distill,
            checkpoint=args.checkpoint and f"{args.checkpoint}-{name}",
            log=lambda r: print(f"  cycle {r['cycle']} ({r['keep']:.3f} kept), epoch {r['rewound_epoch']}: "
                                f"learning rate {r['learning_rates'][0]:.5f}, loss {r['loss']:.4f}"),
        ).model  # fmt: skip

    dense.eval()
    models = {"dense": dense, f"compressed to {args.keep:g}": alds.compress(dense, params=args.keep)}
    print("one-shot")
    models["one-shot, retrained"] = retrained("one-shot", 1)
    print("3 cycles")
    models["3 cycles, retrained"] = retrained("cycles", 3)
    print(f"\n{'':<24}{'parameters':>12}{'accuracy':>12}")
    for name, model in models.items():
        print(f"{name:<24}{sum(p.numel() for p in model.parameters()):>12,}{accuracy(model, test):>12.4f}")
    print(f"\n{time.perf_counter() - begin:.1f} s, {len(test)} test images")


if __name__ == "__main__":
    main()
