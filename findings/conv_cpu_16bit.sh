#!/usr/bin/env bash
# torch 2.13.0, CPU: where oneDNN has no 16-bit convolutions, the gradient of a convolution's weight is added up
# in 16 bits, sample after sample.
#
# oneDNN has them in bf16 from AVX-512 on and in fp16 from AVX-512 FP16 on. On other processors, which are most
# desktops and many servers (AVX2), torch takes a path of its own, whose addend of each sample is rounded into the
# sum: with 1,024 samples, positive inputs and gradients of the output 0.5 + normal, bf16 is 40% off. Here oneDNN is
# turned off, so that every processor shows it. The same convolution in fp32 with its result rounded is right, and
# on an AVX2 processor 25 times as fast.
#
# Seen:
#   torch 2.13.0+cpu, 1 thread
#       4 samples, torch.bfloat16: off by 0.0023, in fp32 by 0.0017
#      64 samples, torch.bfloat16: off by 0.0074, in fp32 by 0.0015
#    1024 samples, torch.bfloat16: off by 0.3961, in fp32 by 0.0013
#       4 samples, torch.float16: off by 0.0003, in fp32 by 0.0002
#      64 samples, torch.float16: off by 0.0009, in fp32 by 0.0002
#    1024 samples, torch.float16: off by 0.0036, in fp32 by 0.0002
#
# Exits with 1 when it no longer happens.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy
OMP_NUM_THREADS=1 "$venv/bin/python" - <<'PYTHON'
import torch

print(f"torch {torch.__version__}, {torch.get_num_threads()} thread")
torch.manual_seed(0)
torch.backends.mkldnn.enabled = False


def gradient(x, weight, dy):
    weight = weight.detach().requires_grad_()
    y = torch.nn.functional.conv1d(x, weight, padding=2)
    return torch.autograd.grad(y, weight, dy)[0]


for dtype in (torch.bfloat16, torch.float16):
    weight = torch.randn(16, 16, 5).to(dtype)
    for samples in (4, 64, 1024):
        x = torch.randn(samples, 16, 20).abs().to(dtype)
        dy = (torch.randn(samples, 16, 20) + 0.5).to(dtype)
        exact = gradient(x.double(), weight.double(), dy.double())
        low, wide = gradient(x, weight, dy), gradient(x.float(), weight.float(), dy.float()).to(dtype)
        off, summed = (((g.double() - exact).norm() / exact.norm()).item() for g in (low, wide))
        print(f"{samples:5} samples, {dtype}: off by {off:.4f}, in fp32 by {summed:.4f}")
    assert off > 8 * summed, "it no longer happens"
PYTHON
