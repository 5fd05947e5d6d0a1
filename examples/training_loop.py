"""Share and audit an update from your own PyTorch training loop.

    python examples/training_loop.py

Trains a small network of its own on the bundled photos for one step, saves what it would share with one
line, and audits the file.  Result: the closed-form attack returns all four photos exactly.
Time: about 10 s on two CPU cores.
"""

from pathlib import Path

import torch
from torch import nn

import leakaudit
from leakaudit.data import load_batch

PHOTOS = Path(__file__).parent / "photos"


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 256), nn.ReLU(), nn.Linear(256, 10))
    batch = load_batch(PHOTOS, (3, 32, 32), 4)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(model(batch.pixels), batch.labels)
    loss.backward()
    leakaudit.save_update(  # the one line
        "runs/loop/shared.safetensors",
        model,
        batch_size=4,
        loss="cross-entropy",
        reduction="mean",
        normalisation=([0.0] * 3, [1.0] * 3),
        input_shape=(3, 32, 32),
        num_classes=10,
    )
    result = leakaudit.attack("runs/loop/shared.safetensors", model, out="runs/loop")
    optimizer.step()

    print(result.verdict.headline)
    print(f"report: {result.folder}/report.html")


if __name__ == "__main__":
    Path("runs/loop").mkdir(parents=True, exist_ok=True)
    main()
