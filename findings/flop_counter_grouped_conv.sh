#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts the weight gradient of a grouped convolution once for each group.
#
# A convolution with G groups has G times fewer products than a dense one, in its forward and in both gradients:
# each gradient costs what the forward costs. torch.utils.flop_counter divides by G in the forward and in the
# gradient of the input, not in that of the weight, so a backward is counted as 1 + G forwards in place of 2:
# 17 for 16 groups. G dense convolutions that compute the same are counted right. The weight's shape, which says
# how many groups there are, is at hand where it counts. A network of grouped convolutions looks several times as
# dear as it is, a ResNeXt or a depthwise one most.
#
# Seen:
#   torch 2.13.0+cpu
#   conv1d, 1 groups: forward 5046272, backward 2.0 forwards, as 1 dense ones 2.0
#   conv1d, 4 groups: forward 1261568, backward 5.0 forwards, as 4 dense ones 2.0
#   conv1d, 16 groups: forward 315392, backward 17.0 forwards, as 16 dense ones 2.0
#   conv2d, 16 groups: forward 2985984, backward 17.0 forwards, as 16 dense ones 2.0
#
# Exits with 1 when it no longer happens.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0 numpy
OMP_NUM_THREADS=1 "$venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

print(f"torch {torch.__version__}")


def count(forward):
    with FlopCounterMode(display=False) as ahead:
        y = forward()
    with FlopCounterMode(display=False) as back:
        y.sum().backward()
    return y, ahead.get_total_flops(), back.get_total_flops()


CASES = ((F.conv1d, (50,), 1), (F.conv1d, (50,), 4), (F.conv1d, (50,), 16), (F.conv2d, (20, 20), 16))
for conv, sizes, groups in CASES:
    torch.manual_seed(0)
    x = torch.randn(2, 64, *sizes, requires_grad=True)
    weight = torch.randn(64, 64 // groups, *[3 + 4 * (len(sizes) == 1)] * len(sizes), requires_grad=True)
    y, forward, backward = count(lambda: conv(x, weight, groups=groups))
    pairs = [*zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)]
    same, plain, plainly = count(lambda: torch.cat([conv(a, b) for a, b in pairs], 1))
    assert torch.allclose(y, same, atol=1e-3) and forward == plain
    print(
        f"{conv.__name__}, {groups} groups: forward {forward}, backward {backward / forward:.1f} forwards, "
        f"as {groups} dense ones {plainly / plain:.1f}"
    )
    assert plainly == 2 * forward and backward == (1 + groups) * forward, "it no longer happens"
PYTHON
