"""Images a second of the usual tutorial loop and of ours: `python tests/benchmark.py`.

Both train the same networks on the same images, in turns. The tutorial's loop is Algorithm 1 as it
is mostly written: DataLoader with ToTensor and Normalize, float32, plain layers, a pass of D each
for real and fake images, fresh z for the generator's step, probabilities and binary cross-entropy,
.item() at every step. It has our Adam (0.001, no momentum, AMSGrad), but neither the R1 penalty nor
a moving average. `--beside` measures ours alone and beside a second training on the same machine.
"""

import argparse
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402 (before torch)

# isort: split
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import transforms  # noqa: E402

import dcgan  # noqa: E402
import gan  # noqa: E402

MODELS = {"GAN": gan, "DCGAN": dcgan}
STEPS = {"GAN": 160, "DCGAN": 32}  # that are timed, in each round
WARM_UP = 4  # steps before them; ours has its penalty in every fourth
BATCH = 128
LATENT_DIM = 100


def tutorial_batches(folder):
    """Batches for ever, (images, labels)."""
    pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    dataset = common.FashionMNIST(folder, transform=pixels)
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


def train_tutorial(G, D, batches, steps, device):
    """So many steps; D gives logits. Returns the losses of each step, (D's, G's)."""
    options = {"lr": 1e-3, "betas": (0.0, 0.999), "amsgrad": True}
    G_optimizer = torch.optim.Adam(G.parameters(), **options)
    D_optimizer = torch.optim.Adam(D.parameters(), **options)
    cross_entropy = nn.BCELoss()
    losses = []
    for images, _ in islice(batches, steps):
        real = images.to(device)
        one = torch.ones(len(real), 1, device=device)
        zero = torch.zeros(len(real), 1, device=device)

        D_optimizer.zero_grad()
        fake = G(torch.randn(len(real), LATENT_DIM, device=device)).detach()
        real_loss = cross_entropy(D(real).sigmoid(), one)
        fake_loss = cross_entropy(D(fake).sigmoid(), zero)
        D_loss = (real_loss + fake_loss) / 2
        D_loss.backward()
        D_optimizer.step()

        G_optimizer.zero_grad()
        fake = G(torch.randn(len(real), LATENT_DIM, device=device))
        G_loss = cross_entropy(D(fake).sigmoid(), one)
        G_loss.backward()
        G_optimizer.step()
        losses.append((D_loss.item(), G_loss.item()))
    return losses


def plain_layers(layers):
    """The same, with the same weights, with Upsample and Conv2d in place of UpsampleConv2d."""
    plain = []
    for layer in layers:
        if isinstance(layer, common.UpsampleConv2d):
            conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False)
            conv.weight = layer.weight
            plain += [nn.Upsample(scale_factor=2), conv]
        else:
            plain.append(layer)
    return nn.Sequential(*plain)


def now(device):
    """The time when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def tutorial_seconds(module, steps, folder, device):
    """A step's seconds."""
    G = plain_layers(module.Generator(LATENT_DIM).layers).to(device)
    D = module.Discriminator().to(device)
    batches = tutorial_batches(folder)
    train_tutorial(G, D, batches, WARM_UP, device)
    start = now(device)
    train_tutorial(G, D, batches, steps, device)
    return (now(device) - start) / steps


def our_seconds(module, steps, folder, device):
    """A step's seconds, of an epoch of so many steps."""
    settings = {"batch_size": BATCH, "learning_rate": 1e-3, "r1_gamma": 1.0}
    settings |= {"latent_dim": LATENT_DIM, "seed": 0}
    settings["precision"] = common.choose_precision("auto", device)
    training = common.new_training(module.Generator, module.Discriminator, settings, device)
    train_set, _ = common.load_fashion_mnist(folder)
    seconds = []
    for count in (WARM_UP, WARM_UP, WARM_UP + steps):
        start = now(device)
        list(common.train(training, train_set, {**settings, "limit": BATCH * count}, 1, 1))
        seconds.append(now(device) - start)
    return (seconds[2] - seconds[1]) / steps  # without what comes once an epoch


def compare_with_tutorial(model, steps, folder, device, rounds):
    tutorial = []
    ours = []
    for _ in range(rounds):
        tutorial.append(BATCH / tutorial_seconds(MODELS[model], steps, folder, device))
        ours.append(BATCH / our_seconds(MODELS[model], steps, folder, device))
    ratios = [our / its for our, its in zip(ours, tutorial, strict=True)]
    print(
        f"{model}: tutorial {statistics.median(tutorial):,.0f} images a second, "
        f"ours {statistics.median(ours):,.0f}, {statistics.median(ratios):.2f} times as many "
        f"({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)",
        flush=True,
    )


def compare_with_neighbour(model, steps, folder, device):
    """Alone, and beside a process that trains the same."""
    alone = our_seconds(MODELS[model], steps, folder, device)
    command = [sys.executable, __file__, "--model", model, "--forever", "--data", folder]
    neighbour = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        if not neighbour.stdout.readline():  # it has a line when it has trained
            raise RuntimeError("the neighbour has ended")
        beside = our_seconds(MODELS[model], steps, folder, device)
    finally:
        neighbour.kill()
    threads = torch.get_num_threads()
    print(f"{model}, {threads} threads: {alone:.4f} s a step alone, {beside:.4f} beside another")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="one of them only")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="in each round")
    parser.add_argument("--beside", action="store_true", help="alone and beside another training")
    parser.add_argument("--forever", action="store_true", help="only train: the other one")
    args = parser.parse_args()
    device = common.choose_device(args.device)
    common.respect_cpu_quota()
    common.load_fashion_mnist(args.data)
    for model in [args.model] if args.model else MODELS:
        steps = args.steps or STEPS[model]
        while args.forever:
            our_seconds(MODELS[model], steps, args.data, device)
            print("trained", flush=True)
        if args.beside:
            compare_with_neighbour(model, steps, args.data, device)
        else:
            compare_with_tutorial(model, steps, args.data, device, args.rounds)


if __name__ == "__main__":
    main()
