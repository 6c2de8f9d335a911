"The command line with a batch norm that is synchronised on CPUs; PyTorch's SyncBatchNorm wants GPUs."
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn, Tensor

from fishnet_nb.cli import main


class Sum(torch.autograd.Function):
    "The sum over all ranks, of a tensor and of its gradient."
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor: return Sum.apply(gradient)


def forward(self: nn.BatchNorm2d, x: Tensor) -> Tensor:  # [N, C, H, W], the same N on all ranks
    "Batch norm with the mean and variance of the images of all ranks."
    if not self.training: return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    mean, square = Sum.apply(torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))]))/dist.get_world_size()
    var, n = square - mean**2, x.numel()//x.shape[1]*dist.get_world_size()
    with torch.no_grad():
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var*n/(n - 1), self.momentum)
        self.num_batches_tracked += 1
    scale = self.weight*(var + self.eps).rsqrt()
    return x*scale[:, None, None] + (self.bias - mean*scale)[:, None, None]


if __name__ == '__main__':
    nn.BatchNorm2d.forward = forward
    sys.exit(main())
