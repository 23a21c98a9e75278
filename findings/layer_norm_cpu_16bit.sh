#!/usr/bin/env bash
# torch 2.13.0, CPU: layer_norm adds the gradients of weight and bias up in 16 bits, row after row.
#
# F.layer_norm of 6,400 rows in bf16, gradients of the output 0.5 + normal: the bias's gradient is their sum over
# the rows, about 3,200 a channel. In bf16 a sum of 512 no longer takes an addend below 1, so it stands still:
# it is 68% off on one thread (37% on two: each thread has its own sums), in fp16 1%. fp32 weight and bias beside
# bf16 rows change nothing, and mean and rstd are saved in 16 bits unless they are fp32. Linear layers
# and sums over rows are summed in fp32 and lose nothing, as does layer_norm on CUDA (convolutions: conv_cpu_16bit.sh).
#
# Seen:
#   torch 2.13.0+cpu, 1 thread
#   torch.bfloat16 rows, torch.bfloat16 weights: dbias off by 0.676, rows summed in fp32 by 0.002
#   torch.bfloat16 rows, torch.float32 weights: dbias off by 0.676, rows summed in fp32 by 0.000
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
rows = torch.randn(6400, 32, dtype=torch.bfloat16)
dy = (torch.randn(6400, 32) + 0.5).to(torch.bfloat16)
exact = dy.double().sum(0)
for dtype in (torch.bfloat16, torch.float32):
    weight, bias = (torch.ones(32, dtype=dtype, requires_grad=True) for _ in range(2))
    y = torch.nn.functional.layer_norm(rows, (32,), weight, bias)
    (dbias,) = torch.autograd.grad(y, bias, dy)
    off, summed = (
        ((x.double() - exact).norm() / exact.norm()).item() for x in (dbias, dy.sum(0, dtype=dtype))
    )
    print(f"{rows.dtype} rows, {dtype} weights: dbias off by {off:.3f}, rows summed in fp32 by {summed:.3f}")
    assert off > 0.5 and summed < 0.01, "it no longer happens"
PYTHON
