"""Which GPUs csrc/build.py compiles for: TORCH_CUDA_ARCH_LIST as torch takes it, nvcc's flags, codes, names.

An architecture is (capability * 10, suffix), the suffix "", "a", "+PTX" or "a+PTX".
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

Architecture = tuple[int, str]

DEFAULT = "8.0;9.0a;10.0+PTX"
NAMED = {
    "kepler+tesla": "3.7",
    "kepler": "3.5+PTX",
    "maxwell+tegra": "5.3",
    "maxwell": "5.0;5.2+PTX",
    "pascal": "6.0;6.1+PTX",
    "volta+tegra": "7.2",
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere+tegra": "8.7",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell+tegra": "11.0",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
}
"""names that TORCH_CUDA_ARCH_LIST may hold (torch/utils/cpp_extension.py, _get_cuda_arch_flags)"""
OLDEST = 80


def read(
    text: str, nvcc: Path, environment: Mapping[str, str]
) -> tuple[tuple[Architecture, ...], tuple[str, ...]]:
    """What this nvcc can build of a TORCH_CUDA_ARCH_LIST, and what is left out, each with its reason.

    text: "8.0;9.0a;10.0+PTX", also divided by spaces or commas and with names ("Hopper", in any case), or
    "native", the GPUs that are here. Empty, and "native" where there is no GPU, mean `DEFAULT`.
    """
    left_out = []
    words = [word for word in re.split(r"[;,\s]+", text) if word]
    if [word.lower() for word in words] == ["native"]:
        words = _visible(environment)
        if not words:
            left_out.append(f"'native' (nvidia-smi names no GPU here; {DEFAULT} instead)")
    words = [part for word in words for part in NAMED.get(word.lower(), word).split(";")]
    known = _known(nvcc, environment)
    found: dict[Architecture, None] = {}
    for word in words or DEFAULT.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)(a?(?:\+PTX)?)", word)
        number = 10 * int(match[1]) + int(match[2]) if match else 0
        if match is None:
            left_out.append(f"{word!r} (not like {DEFAULT!r})")
        elif number < OLDEST:
            left_out.append(f"{word!r} (older than {OLDEST // 10}.{OLDEST % 10})")
        elif match[3].startswith("a") and number < 90:
            left_out.append(f"{word!r} (there is no such code before 9.0a)")
        elif known and number not in known:
            left_out.append(f"{word!r} (this nvcc does not know it)")
        else:
            found[number, match[3]] = None
    return tuple(found), tuple(dict.fromkeys(left_out))


def _known(nvcc: Path, environment: Mapping[str, str]) -> frozenset[int]:
    """Those that a CUDA compiler says it can build for; none where it does not say."""
    run = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, env=dict(environment), check=False
    )
    return frozenset(int(number) for number in re.findall(r"^compute_(\d+)$", run.stdout, re.MULTILINE))


def _visible(environment: Mapping[str, str]) -> list[str]:
    """Compute capabilities of the GPUs here, the newest with PTX, as torch does for "native"."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath))
    if program is None:
        return []
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True, env=dict(environment), check=False)
    found = set(re.findall(r"^(\d+)\.(\d)$", run.stdout, re.MULTILINE)) if run.returncode == 0 else set()
    here = [f"{major}.{minor}" for major, minor in sorted((int(major), int(minor)) for major, minor in found)]
    return [*here[:-1], f"{here[-1]}+PTX"] if here else []


def gencode(architectures: Sequence[Architecture]) -> list[str]:
    """nvcc's flags."""
    flags: dict[str, None] = {}
    for number, suffix in architectures:
        name = f"{number}{suffix[:1].strip('+')}"
        flags[f"-gencode=arch=compute_{name},code=sm_{name}"] = None
        if suffix.endswith("+PTX"):
            flags[f"-gencode=arch=compute_{name},code=compute_{name}"] = None
    return list(flags)


def codes_of(architectures: Sequence[Architecture]) -> list[int]:
    """As ops.cpp's `about` has them: capability * 100, + 1 for an "a", + 2 for PTX."""
    codes: dict[int, None] = {}
    for number, suffix in architectures:
        code = 10 * number + suffix.startswith("a")
        codes[code] = None
        if suffix.endswith("+PTX"):
            codes[code + 2] = None
    return list(codes)


def names(architectures: Sequence[Architecture]) -> str:
    """For people."""
    codes = codes_of(architectures)
    named = [(code % 10 >= 2, f"{code // 10}{'a' if code % 2 else ''}") for code in codes]
    return ", ".join(
        [f"sm_{name}" for ptx, name in named if not ptx]
        + [f"compute_{name} PTX" for ptx, name in named if ptx]
    )
