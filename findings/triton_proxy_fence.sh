#!/usr/bin/env bash
# Triton 3.6.0 and 3.7.0 pipeline a matrix product on sm_90 without fence.proxy.async between the copy into shared
# memory (cp.async, SASS LDGSTS) and the product that reads it (wgmma, SASS HGMMA); 3.7.1 has it (FENCE.VIEW.ASYNC).
# The PTX ISA asks for that fence between the generic and the async proxy. PR 9610 of triton-lang/triton mended it,
# after 3.7.0 was released. torch 2.11 brings 3.6.0. Without pipelining 3.6.0 has the fence, too.
#
# Seen: for each version how many LDGSTS, HGMMA and FENCE.VIEW.ASYNC are in the kernel's one loop:
#   3.6.0: copies 8, products 4, fences 0
#   3.7.0: copies 8, products 4, fences 0
#   3.7.1: copies 8, products 4, fences 1
# Needs pip and 600 MB of disk for a while, no GPU. Exit code 1: the fences are no longer as seen.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/product.py" <<'PY'
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a_ptr, b_ptr, c_ptr, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, i = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    a, b = a_ptr + m[:, None] * k + i[None, :], b_ptr + i[:, None] * BN + n[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, k, BK):
        total = tl.dot(tl.load(a), tl.load(b), total)
        a += BK
        b += BK * BN
    tl.store(c_ptr + m[:, None] * BN + n[None, :], total.to(tl.bfloat16))


kinds = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16", "k": "i32"}
aligned = {(at,): [["tt.divisibility", 16]] for at in range(4)}
source = ASTSource(product, {**kinds, **dict.fromkeys(("BM", "BN", "BK"), "constexpr")},
                   {"BM": 64, "BN": 64, "BK": 64}, aligned)
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
Path(sys.argv[1]).write_bytes(built.asm["cubin"])
tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
sass = subprocess.run([tool, "-c", sys.argv[1]], capture_output=True, text=True, check=True).stdout
lines = sass.splitlines()
label = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
back = [(label[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r"BRA `\((\.L_\w+)\)", line))]
loops = ["\n".join(lines[first:last]) for first, last in back if first < last]
loop, = [text for text in loops if "LDGSTS" in text and "HGMMA" in text]
counts = {word: len(re.findall(rf"\b{word}", loop)) for word in ("LDGSTS", "HGMMA", "FENCE.VIEW.ASYNC")}
print(f"{triton.__version__}: copies {counts['LDGSTS']}, products {counts['HGMMA']}, "
      f"fences {counts['FENCE.VIEW.ASYNC']}")
PY
for version in 3.6.0 3.7.0 3.7.1; do
  python3 -m venv "$work/venv-$version"
  "$work/venv-$version/bin/pip" install --quiet --no-compile --disable-pip-version-check "triton==$version" setuptools 2>/dev/null
  TRITON_CACHE_DIR="$work/cache-$version" "$work/venv-$version/bin/python" "$work/product.py" "$work/out.cubin" | tee -a "$work/seen"
  rm -rf "$work/venv-$version"
done
for want in '3.6.0.* fences 0$' '3.7.0.* fences 0$' '3.7.1.* fences [1-9]'; do
  grep -q "^$want" "$work/seen" || { echo "no longer so: $want" >&2; exit 1; }
done
