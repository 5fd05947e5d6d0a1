"""A vision transformer with a head that is not zero, as a factory for `--model`.

    leakaudit capture --model examples/vit_factory.py:vit_b_16 --data examples/photos --input-shape 3,224,224 \
        --normalisation imagenet --out runs/vit/shared.safetensors --truth runs/vit/truth.safetensors
    leakaudit attack  --model examples/vit_factory.py:vit_b_16 --checkpoint runs/vit/model.safetensors \
        runs/vit/shared.safetensors --truth runs/vit/truth.safetensors --out runs/vit

torchvision starts the head at zero, where no gradient reaches the rest; a checkpoint after one step of training has
no such zero.  Result and time: see docs/results.md.
"""

from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models import vit_b_16 as build


def vit_b_16(num_classes: int = 1000) -> VisionTransformer:
    """ViT-B/16 with a small random head."""
    model = build(num_classes=num_classes)
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model
