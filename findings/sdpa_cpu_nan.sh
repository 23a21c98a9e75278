#!/usr/bin/env bash
# torch 2.13.0, CPU: scaled_dot_product_attention gives 0 for a query of NaN that meets fewer than 16 keys.
#
# The fused kernel takes the maximum of a row of scores vector by vector, which keeps NaN, and of what is left over
# value by value, which drops it: a row of NaN with fewer values than a vector holds (16 of fp32 with AVX-512, 8 with
# AVX2) has the maximum -inf and counts as fully masked, result 0. The backward pass gives NaN either way. With 16
# keys and more, and always with SDPBackend.MATH, the result is NaN. The same happens where all keys are NaN, in fp32,
# bf16 and fp16. PyTorch issue 141128 (closed) is the same of 2.5, where 16 keys gave 0 too.
#
# Seen, on a processor with AVX-512:
#   torch 2.13.0+cpu, AVX512
#   keys whose NaN query gives NaN: fused 16 17 18 19, math 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19
#
# Exits with 1 when it no longer happens.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy
"$venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
shown = {}
for name, kernel in (("fused", SDPBackend.FLASH_ATTENTION), ("math", SDPBackend.MATH)):
    shown[name] = []
    for keys in range(1, 20):
        q, k, v = (torch.ones(1, 1, keys, 8) for _ in range(3))
        q[0, 0, 0] = float("nan")
        with sdpa_kernel(kernel):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        if out[0, 0, 0].isnan().all():
            shown[name].append(keys)
        else:
            assert (out[0, 0, 0] == 0).all()
words = (f"{name} {' '.join(map(str, keys))}" for name, keys in shown.items())
print("keys whose NaN query gives NaN:", ", ".join(words))
assert shown["math"] == list(range(1, 20))
assert shown["fused"] and shown["fused"][0] in (8, 16), "it no longer happens"
PYTHON
