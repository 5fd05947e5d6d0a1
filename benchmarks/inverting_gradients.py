"""`inverting-gradients` on CIFAR-10 images: PSNR per image, mean and spread.

    python benchmarks/inverting_gradients.py --model lenet --images 16
    python benchmarks/inverting_gradients.py --model resnet20 --images 8
    python benchmarks/inverting_gradients.py --model resnet20 --checkpoint resnet20-12fca82f.th --images 8

Images are the first of --data (an .npz with `images` uint8 NHWC and `labels`); labels are known, as
in the paper; BatchNorm is in eval mode; every image meets a freshly initialised model of its own
seed unless a checkpoint is given.  One JSON line an image, then the summary.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.registry import ATTACKS
from leakaudit.data import load_batch
from leakaudit.formats.manifest import Normalisation
from leakaudit.metrics import METRICS
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.spec import parse
from leakaudit.threat import Knowledge, View, known

CIFAR = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help=".npz, folder or torchvision:NAME")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--checkpoint")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--start", type=int, default=0, help="first image")
    parser.add_argument("--attack", default="tuned-inverting-gradients", help="name:key=value,...")
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    attack = parse(options.attack, ATTACKS, "attack")
    batch = load_batch(options.data, (3, 32, 32), options.images, start=options.start)
    scores: dict[str, list[float]] = {"psnr": [], "ssim": []}
    for index in range(options.images):
        began = time.monotonic()
        victim = load_victim(
            options.model,
            checkpoint=options.checkpoint,
            num_classes=10,
            input_shape=(3, 32, 32),
            normalisation=CIFAR,
            seed=index,
        ).to(options.device)
        pixels = batch.pixels[index : index + 1].to(options.device)
        labels = batch.labels[index : index + 1].to(options.device)
        round = Round(num_examples=1)
        observed = client_update(victim, victim.params, round, victim.space.encode(pixels), labels)
        view = View(victim, round, observed.detach(), Knowledge(labels=known(labels, "given")))
        best = min(
            (
                attack.run(view, fork(index, f"start/{restart}", options.device), Monitor())
                for restart in range(options.restarts)
            ),
            key=lambda attempt: attempt.loss,
        )
        found = victim.space.decode(best.x).clamp(0, 1)
        row = {name: float(METRICS[name].function(found.cpu(), pixels.cpu())[0]) for name in scores}
        for name, value in row.items():
            scores[name].append(value)
        seconds = float(f"{time.monotonic() - began:.3g}")
        print(
            json.dumps(
                {"image": options.start + index, **row, "loss": best.loss, **best.details, "seconds": seconds}
            ),
            flush=True,
        )
    summary = {
        name: {"mean": statistics.mean(values), "spread": statistics.pstdev(values)}
        for name, values in scores.items()
    }
    print(
        json.dumps({**vars(options), **summary, "torch": torch.__version__, "machine": platform.processor()})
    )


if __name__ == "__main__":
    main()
