"""Our training loop against the textbook's: `python tests/benchmark.py`, on Linux or macOS and nothing else.

Each side trains the same networks on the same images, in a process of its own, in turns, ROUNDS times.
Printed are the medians: images per second and their ratio, milliseconds per phase, page faults, memory, and
the share of the machine's measured matrix-product rate that the arithmetic of the networks reaches.

The textbook's loop is Algorithm 1 as tutorials write it: DataLoader with ToTensor and Normalize, float32,
nn.Upsample and nn.Conv2d, default Adam, probabilities and binary cross-entropy, .item() at every
step. It draws fresh z for the generator's step, and it has neither a moving average nor the R1 penalty.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.datasets import FashionMNIST  # noqa: E402

import common  # noqa: E402
import dcgan  # noqa: E402
import gan  # noqa: E402

MODELS = {"GAN": gan, "DCGAN": dcgan}
STEPS = {"GAN": 150, "DCGAN": 12}  # timed, after a third as many that are not
ROUNDS = 3
BATCH = 128
PHASES = ("data", "D forward", "D backward", "G forward", "G backward", "optimizers", "average", "rest")


class Stopwatch:
    """Adds up the milliseconds of named phases; what no phase claims is "rest"."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def wrap(self, phase, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - start

        return timed


def time_networks(watch, G, D, optimizers):
    """Let the stopwatch see the forward passes, the two backward passes of a step and the optimizers."""
    G.forward, D.forward = watch.wrap("G forward", G.forward), watch.wrap("D forward", D.forward)
    for optimizer in optimizers:
        optimizer.step = watch.wrap("optimizers", optimizer.step)
    backward, phases = torch.Tensor.backward, ("D backward", "G backward")
    calls = iter(range(10**9))
    torch.Tensor.backward = lambda loss: watch.wrap(phases[next(calls) % 2], backward)(loss)


def textbook_network(network):
    """The network with torch's own layers where ours has others for the same; same weights."""
    layers = []
    for layer in network.layers:
        if isinstance(layer, dcgan.UpsampleConv):
            conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False)
            conv.load_state_dict(layer.state_dict())
            layers += [nn.Upsample(scale_factor=2), conv]
        else:
            layers.append(layer)
    network.layers = nn.Sequential(*layers)
    return network


def textbook_batches(data):
    """Batches for ever, from torchvision's data set by the usual DataLoader."""
    pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    loader = DataLoader(FashionMNIST(data, transform=pixels), batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        yield from (x for x, _ in loader)


def run_textbook(model, data, steps, watch):
    module = MODELS[model]
    torch.manual_seed(0)
    G, D, loss = textbook_network(module.Generator()), textbook_network(module.Discriminator()), nn.BCELoss()
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.999)) for network in (G, D)]
    time_networks(watch, G, D, optimizers)
    next_batch = watch.wrap("data", textbook_batches(data).__next__)
    one, zero = torch.ones(BATCH, 1), torch.zeros(BATCH, 1)
    for step in range(-(steps // 3), steps):
        if step == 0:
            start, faults = begin(watch)
        x = next_batch()
        optimizers[1].zero_grad()
        real_loss = loss(D(x).sigmoid(), one)
        fake_loss = loss(D(G(torch.randn(BATCH, 100)).detach()).sigmoid(), zero)
        D_loss = (real_loss + fake_loss) / 2
        D_loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        G_loss = loss(D(G(torch.randn(BATCH, 100))).sigmoid(), one)
        G_loss.backward()
        optimizers[0].step()
        D_loss.item(), G_loss.item()
    return report(watch, start, faults, steps)


def run_ours(model, data, steps, watch, precision):
    common.use_the_cpu_well()
    module = MODELS[model]
    device = torch.device("cpu")
    dtype = common.choose_dtype(precision, device)
    settings = {"seed": 0, "latent_dim": 100, "learning_rate": 1e-3, "batch_size": BATCH, "r1_gamma": 1.0}
    training = common.new_training(module.Generator, module.Discriminator, settings, device)
    time_networks(watch, training.G, training.D, (training.G_optimizer, training.D_optimizer))
    common.update_average = watch.wrap("average", common.update_average)
    images = common.load_fashion_mnist(Path(data))[0]
    common.train_epoch(training, images[: BATCH * (steps // 3)], 1, settings, dtype, lambda: None)
    start, faults = begin(watch)
    common.train_epoch(training, images[: BATCH * steps], 1, settings, dtype, lambda: None)
    return report(watch, start, faults, steps)


def begin(watch):
    watch.seconds.clear()
    return time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def report(watch, start, faults, steps):
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    phases = {phase: watch.seconds[phase] / steps * 1000 for phase in PHASES}
    phases["rest"] = seconds / steps * 1000 - sum(phases.values())
    return {
        "images per second": BATCH * steps / seconds,
        "page faults per step": (usage.ru_minflt - faults) / steps,
        "peak memory in MB": usage.ru_maxrss / 1024,
        **phases,
    }


def flops_per_step(model):
    """Multiplications and additions of the convolutions and matrix products in one step of ours."""
    module = MODELS[model]
    G, D = module.Generator(), module.Discriminator()
    optimizers = [torch.optim.SGD(network.parameters(), lr=0) for network in (G, D)]
    x, z = torch.zeros(BATCH, 1, 28, 28), torch.zeros(BATCH, 100)
    with FlopCounterMode(display=False) as counter:
        common.train_step(common.Training(G, D, G, *optimizers), x, z, 0, torch.float32)
    return counter.get_total_flops()


def matrix_product_rate(dtype):
    """Multiplications and additions per second in the product of two 2048x2048 matrices: the best of 10."""
    a = torch.randn(2048, 2048).to(dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def median_of(results):
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def compare(model, data, sides):
    results = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side in sides:
            command = [sys.executable, __file__, "--side", side, "--model", model, "--data", data]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[side].append(json.loads(output.splitlines()[-1]))
    medians = {side: median_of(results[side]) for side in sides}

    print(f"\n{model}, batch {BATCH}, medians of {ROUNDS} runs of {STEPS[model]} steps")
    print(f"{'':24}" + "".join(f"{side:>12}" for side in sides))
    for key in medians["textbook"]:
        unit = " (ms)" if key in PHASES else ""
        print(f"{key + unit:24}" + "".join(f"{medians[side][key]:12,.1f}" for side in sides))
    for side in sides[1:]:
        ratios = [b["images per second"] / a["images per second"]
                  for a, b in zip(results["textbook"], results[side], strict=True)]
        rate = medians[side]["images per second"]
        share = flops_per_step(model) * rate / BATCH / matrix_product_rate(getattr(torch, side))
        print(f"{side}: {statistics.median(ratios):.1f} times the textbook "
              f"({min(ratios):.1f} to {max(ratios):.1f} in {ROUNDS} rounds); "
              f"{60_000 / rate:.1f} s an epoch of 60,000 images; {share:.0%} of the matrix-product rate")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--data", default=str(ROOT / "data"))
    parser.add_argument("--bfloat16", action="store_true", help="also where the hardware does not have it")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        watch, steps = Stopwatch(), STEPS[args.model]
        if args.side == "textbook":
            result = run_textbook(args.model, args.data, steps, watch)
        else:
            result = run_ours(args.model, args.data, steps, watch, args.side)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:  # torchvision's layout, which both sides read
        common.load_fashion_mnist(Path(args.data))
        sources = common.verified_files(args.data) or common.verified_files(common.DEBIAN_FOLDER)
        for name, content in sources.items():
            common.save(Path(folder, "FashionMNIST", "raw", name), lambda file, x=content: file.write(x))
        bfloat16 = args.bfloat16 or common.choose_dtype("auto", torch.device("cpu")) is torch.bfloat16
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
              f"{torch.backends.cpu.get_cpu_capability()}, bfloat16 units: {'yes' if bfloat16 else 'no'}")
        for model in [args.model] if args.model else MODELS:
            compare(model, folder, ["textbook", "float32"] + ["bfloat16"] * bfloat16)


if __name__ == "__main__":
    main()
