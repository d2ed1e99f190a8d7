"""Does the answer of classifier.py hold for a convolutional network? The same comparison with torchvision's resnet18.

python -m lab.resnet --n_real=5000 --n_synthetic=25000      three arms, three seeds; results in out/classifier.json

The settings of classifier.py hold here too, but for hidden and dropout, which are the MLP's.
"""

import math

import torch
from torch import nn
from torchvision.models import resnet18

import classifier
from configurator import configure
from ddpm import check

# ---------------------------------------------------------------------------------------------------------------------
arms = "real,real+synthetic,real+real"
seeds = 3
max_iters = 780  # 20 epochs of 5,000 images
batch_size = 128
shift = 4
eval_interval = 78  # two epochs of 5,000 images
warmup_iters = 78
# ---------------------------------------------------------------------------------------------------------------------


class ResNet18:
    """torchvision's resnet18 for small images: a 3x3 stem of stride 1 instead of 7x7 of stride 2. It keeps the pooling.

    In the place of classifier.MLP: x (B, H*W*C) -> logits (B, K). Autograd computes its gradients.
    """

    def __init__(self, sizes, dropout, seed, device):
        self.side = math.isqrt(sizes[0])
        self.channels = 1 if self.side**2 == sizes[0] else 3
        self.side = math.isqrt(sizes[0] // self.channels)
        torch.manual_seed(seed)
        self.net = resnet18(num_classes=sizes[-1])
        self.net.conv1 = nn.Conv2d(self.channels, 64, 3, padding=1, bias=False)
        self.net.to(device, memory_format=torch.channels_last)

    def forward(self, x, training=False):
        x = x.view(-1, self.side, self.side, self.channels).movedim(-1, 1)
        with torch.set_grad_enabled(training):
            self.logits = self.net.train(training)(x)
        return self.logits.detach()

    def backward(self, d):
        self.net.zero_grad()
        self.logits.backward(d)

    def weights(self):
        """The parameters, and then the means and variances of the batch norms, which have no gradients."""
        return [v.detach() for v in (*self.net.parameters(), *self.net.buffers()) if v.is_floating_point()]

    def gradients(self):
        return [p.grad for p in self.net.parameters()]


if __name__ == "__main__":
    config, given = configure(globals(), also="classifier.py")
    check(not {"hidden", "dropout"} & given.keys(), "hidden and dropout are settings of the MLP")
    vars(classifier).update(config)
    classifier.main(config, ResNet18)
