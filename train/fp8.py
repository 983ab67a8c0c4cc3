"""The frozen teacher's linear layers in 8 bits: float8 e4m3, with one scale per row of each operand.

GPUs since Hopper multiply e4m3 up to twice as fast as bfloat16. A CPU rounds the operands in the same way and
multiplies them in float32, so that the effect on the losses can be measured there.

Shapes: N tokens, I in, O out.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from lrc_edge.errors import UserError

E4M3 = torch.float8_e4m3fn
UNIT = 16  # the GPU's instruction needs multiples of this on both axes of a weight
LARGEST_ERROR = 0.01  # of a product on this device, relative to the CPU's: bfloat16 rounds to 0.004

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def in_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows in e4m3, float32 scale of each row): x is about rows * scale. The largest value becomes 448."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(E4M3).max
    return (x.float() / scale).to(E4M3), scale


def multiplied_by_cpu(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    (x, x_scale), (weight, weight_scale) = in_rows(x_NI), in_rows(weight_OI)
    with torch.autocast(x.device.type, enabled=False):
        return (x.float() @ weight.float().T * x_scale * weight_scale.T).to(x_NI.dtype)


def multiplied_by_gpu(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    (x, x_scale), (weight, weight_scale) = in_rows(x_NI), in_rows(weight_OI)
    product = torch._scaled_mm(x, weight.T, scale_a=x_scale, scale_b=weight_scale.T, out_dtype=torch.bfloat16)
    return product.to(x_NI.dtype)


PRODUCTS: dict[str, Product] = {"cpu": multiplied_by_cpu, "cuda": multiplied_by_gpu}  # by type of device


class Float8Linear(nn.Linear):
    """A linear layer that rounds its weight in every forward pass. The stored weight keeps its type, for sharding and
    for composing the student's weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = PRODUCTS[x.device.type](x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return product if self.bias is None else product + self.bias


def multiply_in_fp8_(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Let the linear layers of frozen layers multiply in e4m3. Raises UserError if the device cannot,
    or if UNIT does not divide the shape of a weight."""
    _check(device)
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                if module.in_features % UNIT or module.out_features % UNIT:
                    raise UserError(f"train.teacher_precision = 'fp8': the teacher's {name} is {module.in_features} -> "
                                    f"{module.out_features}; need multiples of {UNIT}; use "
                                    "--set train.teacher_precision=auto")
                module.__class__ = Float8Linear  # type: ignore[assignment]  # keeps the parameters, their names and the hooks


def _check(device: torch.device) -> None:
    """Multiply two small matrices on the device and compare the product with the CPU's."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    expected = multiplied_by_cpu(x, weight).float()
    try:
        got = PRODUCTS[device.type](x.to(device), weight.to(device)).cpu().float()
        error = ((got - expected).norm() / expected.norm()).item()
        problem = "" if error <= LARGEST_ERROR else f"its product is off by {error:.1%}"
    except (RuntimeError, ValueError) as failure:  # of torch, for a GPU that has no such instruction
        problem = str(failure).splitlines()[0][:120]
    if problem:
        raise UserError(f"train.teacher_precision = 'fp8': {device.type} cannot multiply e4m3 with a scale per row "
                        f"({problem}); use --set train.teacher_precision=auto")
