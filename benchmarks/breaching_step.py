"""`breaching` 0.1.2 (Geiping et al., github.com/JonasGeiping/breaching) running its cosine attack, for `step.py`.

Runs in an environment of its own, with `pip install breaching==0.1.2` and without leakaudit.  For every number read
from stdin it makes an attack of so many iterations and writes a line of JSON: seconds of each iteration, from one
evaluation of its objective to the next, the last matching loss, PSNR and the number of parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time

import breaching
import numpy as np
import torch
from breaching.cases.models.model_preparation import construct_model

NAMES = {"lenet": "lenet_zhu", "convnet": "convnet", "resnet18": "resnet18"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=NAMES, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it loads
        case = breaching.get_config(overrides=["attack=invertinggradients", "case/data=CIFAR10"])
    model, loss = construct_model(NAMES[options.model], case.case.data, pretrained=False)
    model = model.to(device).eval()
    with np.load(options.data, allow_pickle=False) as arrays:
        images = arrays[arrays.files[0]][: options.batch]
    pixels = torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float().contiguous() / 255
    mean, std = (
        torch.tensor(value, device=device).view(-1, 1, 1)
        for value in (case.case.data.mean, case.case.data.std)
    )
    labels = torch.arange(options.batch, device=device) % 10
    task = loss(model((pixels - mean) / std), labels)
    gradients = [g.detach() for g in torch.autograd.grad(task, list(model.parameters()))]
    metadata = {"num_data_points": options.batch, "labels": labels, "local_hyperparams": None}
    payload = {
        "parameters": list(model.parameters()),
        "buffers": list(model.buffers()),
        "metadata": case.case.data,
    }
    shared = {"gradients": gradients, "buffers": None, "metadata": metadata}
    for line in sys.stdin:
        case.attack.optim.max_iterations = int(line)
        setup = {"dtype": torch.float, "device": device}
        attacker = breaching.attacks.prepare_attack(model, loss, case.attack, setup)
        times: list[float] = []
        attacker.objective.register_forward_pre_hook(lambda *_, times=times: times.append(clock(device)))
        found, history = attacker.reconstruct([payload], [shared], {}, dryrun=False)
        times.append(clock(device))
        error = float(((found["data"].detach() * std + mean).clamp(0, 1) - pixels).square().mean())
        row = {
            "seconds": list(np.diff(times[:-2])),  # the last evaluation scores the trial
            "loss": history["Trial_0_Val"][-1],
            "psnr": -10 * float(np.log10(error)),
            "parameters": sum(p.numel() for p in model.parameters()),
            "torch": torch.__version__,
        }
        print(json.dumps(row), flush=True)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
