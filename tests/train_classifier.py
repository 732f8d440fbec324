"""How outputs/reference/classifier.pt was made: `python tests/train_classifier.py FILE`.

Images are judged by it in compare.py, so the committed file stays as it is: another one is another
scale. Trained on one thread of an Intel Xeon with torch 2.15, its test accuracy is 0.9328.
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402 (before torch)

# isort: split
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

import compare  # noqa: E402


def train_classifier(images, labels, epochs):
    """A Classifier trained on uint8 images (N, 28, 28) and their labels (N,)."""
    torch.manual_seed(0)
    classifier = compare.Classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, epochs=epochs, steps_per_epoch=math.ceil(len(images) / 128)
    )
    for _ in tqdm(range(epochs), "training the classifier"):
        for batch in torch.randperm(len(images)).split(128):
            x = common.scale(images[batch][:, None])
            mirrored = torch.rand(len(batch)) < 0.5  # a garment is the same garment in a mirror
            x[mirrored] = x[mirrored].flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(classifier(x), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    train_set, test_set = common.load_fashion_mnist(args.data)
    classifier = train_classifier(train_set.data, train_set.targets, epochs=20)
    _, classes = compare.classify(classifier, test_set.data)
    accuracy = (classes == test_set.targets).float().mean().item()
    torch.save({"weights": classifier.state_dict(), "accuracy": accuracy}, args.file)
    print(f"{args.file}: test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
