r"""The small CNN of PyTorch's CIFAR-10 tutorial, with which Flower's quickstart begins too.

    leakaudit capture --model examples/quickstart_cnn.py:cnn --data examples/photos \
        --out shared.safetensors --truth truth.safetensors
    leakaudit attack  --model examples/quickstart_cnn.py:cnn --checkpoint model.safetensors shared.safetensors \
        --truth truth.safetensors --out runs/quickstart
"""

import torch.nn.functional as F
from torch import Tensor, nn


class CNN(nn.Module):
    """Two convolutions with ReLU and max-pooling, three fully connected layers, for 3x32x32 pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def cnn(num_classes: int = 10) -> nn.Module:
    return CNN(num_classes)
