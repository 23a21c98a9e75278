"""What a compiled kernel holds: registers, spills, shared memory, and every access to global memory.

Three texts are put together. Triton's IR (TTGIR) says which argument a load or store goes to and how many
bytes it gives each thread; PTX says where in the source each instruction comes from; the disassembly of the
cubin says how wide the instruction became, and, by its own line table, which PTX instruction it was.

An access through a pointer that was itself loaded, from a table of pointers, goes by the table's name with a
star in front: `*table_ptr`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import prod

Place = tuple[tuple[str, int, int], ...]
"""(file, line, column) of an access and of the calls it was inlined from, innermost first; at most two"""

UNKNOWN = "?"


@dataclass(frozen=True)
class Access:
    """One load or store of a kernel's source."""

    kind: str
    """"load" or "store"; copies into shared memory are loads"""
    pointer: str
    """name of the kernel's argument; "a|b" when either may be behind it"""
    item: int
    """bytes of an element"""
    lane: float | None
    """bytes for each thread of the program; None: one value, the same for all threads"""
    place: Place


@dataclass
class Traffic:
    """All accesses of one kind to one argument, as compiled."""

    item: int = 0
    """bytes of an element"""
    blocks: list[tuple[int, float, int]] = field(default_factory=list)
    """(bits per thread of the instruction, bytes of the block per thread, instructions)"""
    scalars: int = 0
    """instructions for single values"""


@dataclass
class Resources:
    """What one cubin needs of a multiprocessor, and what it does."""

    registers: int = 0
    spilled: int = 0
    """bytes of stack and local memory per thread"""
    shared: int = 0
    warps: int = 0
    products: dict[str, int] = field(default_factory=dict)
    """matrix instructions by name, HGMMA, HMMA, UTCHMMA"""
    traffic: dict[str, Traffic] = field(default_factory=dict)
    """"load x_ptr" -> Traffic"""
    bulk: int = 0
    """instructions of the bulk copy engine (TMA)"""
    unfenced: int = 0
    """loops that copy into shared memory and multiply from it without a fence between (`unfenced_loops`)"""


_TYPE_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_OPERATION = re.compile(r"^\s*(?:(%[\w#]+)(?::\d+)?\s*=\s*)?\"?([\w.]+)\"?(.*)$")
_VALUE = re.compile(r"%[\w]+(?:#\d+)?")
_ITERATION = re.compile(r"(%\w+) = (%\w+(?:#\d+)?)")
_POINTERS = re.compile(r"tensor<((?:\d+x)+)!tt\.ptr<([\w]+)>")
_POINTER = re.compile(r"!tt\.ptr<([\w]+)>")
_ACCESS = {
    "tt.load": "load",
    "tt.store": "store",
    "ttg.async_copy_global_to_local": "load",
    "tt.atomic_rmw": "store",
    "tt.atomic_cas": "store",
}
_REGIONS = {"scf.for", "scf.while", "scf.if"}


class _Origins:
    """Which argument of the function each pointer value comes from."""

    def __init__(self) -> None:
        self.arguments: set[str] = set()
        self.made: dict[str, tuple[str, list[str]]] = {}
        self.regions: list[tuple[str, list[str]]] = []
        """open loops and branches: result, and what a loop begins with"""

    def of(self, value: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        """Names of arguments; none for what does not come from one."""
        base = value.partition("#")[0]
        if base in self.arguments:
            return frozenset({base.lstrip("%")})
        if value in seen or (value not in self.made and base not in self.made):
            return frozenset()
        operation, operands = self.made.get(value) or self.made[base]
        seen = seen | {value}
        if operation == "tt.load":
            return frozenset({f"*{name}" for name in self.of(operands[0], seen)})
        if operation == "arith.select":
            operands = operands[1:]
        elif operation != "either":
            operands = operands[:1]
        return frozenset().union(*(self.of(operand, seen) for operand in operands))

    def enter(self, result: str, starts: list[tuple[str, str]]) -> None:
        """A loop or branch; starts: what a loop carries, and from where."""
        for name, start in starts:
            self.made[name] = ("either", [start])
        self.regions.append((result, [start for _, start in starts]))

    def leave(self) -> None:
        """A loop that never runs gives what it began with."""
        if self.regions:
            _, starts = self.regions[-1]
            self.give(starts)
            self.regions.pop()

    def give(self, values: list[str]) -> None:
        """What the innermost loop or branch results in."""
        result = self.regions[-1][0] if self.regions else ""
        for i, value in enumerate(values if result else []):
            self.made.setdefault(f"{result}#{i}", ("either", []))[1].append(value)
            if len(values) == 1:
                self.made.setdefault(result, ("either", []))[1].append(value)


def accesses(ttgir: str) -> list[Access]:
    """Every load and store of a kernel, from the text of its TTGIR."""
    threads = 32 * int(_search(r'"ttg\.num-warps" = (\d+)', ttgir))
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    origins = _Origins()
    found = []
    for line in ttgir.splitlines():
        code, located, tail = line.rpartition(" loc(")
        code = code if located else line
        match = _OPERATION.match(code)
        if "tt.func" in line:
            origins.arguments |= set(re.findall(r"(%\w+): ", line))
        elif match is None:
            if code.strip() == "}":
                origins.leave()
        else:
            result, operation, rest = match.groups()
            operands = _VALUE.findall(rest.split(" : ")[0] if operation in _ACCESS else rest)
            if operation in _REGIONS:
                origins.enter(result or "", _ITERATION.findall(rest))
            elif operation == "scf.yield":
                origins.give(operands)
            elif result:
                origins.made[result] = (operation, operands)
            if operation in _ACCESS:
                names = "|".join(sorted(origins.of(operands[0]))) or UNKNOWN
                found.append(_access(operation, names, rest, threads, _resolve(tail, places)))
    return found


def _access(operation: str, names: str, rest: str, threads: int, place: Place) -> Access:
    pointer, block = _POINTER.search(rest), _POINTERS.search(rest)
    item = _TYPE_BYTES.get(pointer[1], 8) if pointer is not None else 8
    lane = None
    if block is not None:
        lane = prod(int(size) for size in block[1].split("x")[:-1]) * item / threads
    return Access(_ACCESS[operation], names, item, lane, place)


def _resolve(text: str, named: dict[str, str], depth: int = 0) -> Place:
    """`#loc35)` or `callsite(#loc1 at #loc2)` or `"x"(#loc3)` as places."""
    text = text.strip().rstrip(")") if depth == 0 else text.strip()
    if depth > 40:
        return ()
    if text.startswith("#loc"):
        return _resolve(named.get(text, ""), named, depth + 1)
    call = re.match(r"callsite\((\S+) at (\S+?)\)*$", text)
    if call is not None:
        return (_resolve(call[1], named, depth + 1) + _resolve(call[2], named, depth + 1))[:2]
    exact = re.match(r'"([^"]*)":(\d+):(\d+)', text)
    if exact is not None:
        return ((exact[1].rpartition("/")[2], int(exact[2]), int(exact[3])),)
    inner = re.match(r'"[^"]*"\((.*?)\)*$', text) or re.match(r"fused(?:<.*?>)?\[([^,\]]*)", text)
    return _resolve(inner[1], named, depth + 1) if inner is not None else ()


_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"')
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")


def ptx_places(ptx: str) -> list[Place]:
    """For each line of the PTX (from line 1 at index 1) the source it comes from.

    Lines of inline assembly come from where the assembly begins: LLVM counts on inside it.
    """
    files = {int(number): name.rpartition("/")[2] for number, name in _matches(_FILE, ptx)}
    found: list[Place] = [()]
    now: Place = ()
    inside = False
    for line in ptx.splitlines():
        loc = _LOC.match(line)
        if loc is not None and not inside:
            numbers = [int(n) for n in loc.groups() if n is not None]
            now = tuple(
                (files.get(numbers[i], ""), numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3)
            )
        inside = (inside or "// begin inline asm" in line) and "// end inline asm" not in line
        found.append(now)
    return found


def _matches(pattern: re.Pattern[str], text: str) -> list[tuple[str, ...]]:
    return [match.groups() for match in map(pattern.match, text.splitlines()) if match is not None]


_ASYNC_PRODUCTS = {"HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA"}
"""matrix instructions that read shared memory through the async proxy (wgmma, tcgen05)"""
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_BRANCH = re.compile(r"`\((\.L_\w+)\)")


def unfenced_loops(sass: str) -> int:
    """Loops with copies by cp.async, products that read shared memory through the async proxy, and no fence.

    What cp.async writes through the generic proxy is only sure to be seen through the async one after a
    fence.proxy.async (PTX ISA, "Async proxy"), which is FENCE.VIEW.ASYNC here. Triton up to 3.7.0 leaves it
    out (triton-lang/triton PR 9610). sass: of `nvdisasm -c`. A loop is what lies before a branch back.
    """
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    found = 0
    for text in sass.splitlines():
        if label := _LABEL.match(text):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(text):
            code.append((instruction[1], text))
    for last, (mnemonic, text) in enumerate(code):
        target = _BRANCH.search(text) if mnemonic.startswith("BRA") else None
        if target is None or labels.get(target[1], last) >= last:
            continue
        inside = [name for name, _ in code[labels[target[1]] : last]]
        names = {name.partition(".")[0] for name in inside}
        fenced = any(name.startswith("FENCE.VIEW.ASYNC") for name in inside)
        found += "LDGSTS" in names and bool(names & _ASYNC_PRODUCTS) and not fenced
    return found


_PTX_LINE = re.compile(r'//## File "\.nv_debug_ptx_txt", line (\d+)')
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_GLOBAL = {"LDG": "load", "LD": "load", "LDGSTS": "load", "STG": "store", "ST": "store", "ATOMG": "store",
           "ATOM": "store", "RED": "store", "REDG": "store"}  # fmt: skip
_LOCAL = {"LDL", "STL"}
_PRODUCTS = {
    "HGMMA",
    "HMMA",
    "QGMMA",
    "IGMMA",
    "IMMA",
    "DMMA",
    "UTCHMMA",
    "UTCQMMA",
    "UTCIMMA",
    "OMMA",
    "QMMA",
}
_BULK = {"UTMALDG", "UTMASTG", "UBLKCP", "UTMAREDG"}


def width_of(mnemonic: str) -> int:
    """Bits per thread of a memory instruction: `LDG.E.128` is 128, `STG.E.U8` 8, `LDG.E` 32."""
    for part in mnemonic.split(".")[1:]:
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16", "F16"):
            return 16
    return 32


def resources(usage: str, sass: str, ptx: str, ttgir: str, shared: int) -> Resources:
    """Put the texts together.

    usage: of `cuobjdump --dump-resource-usage`; sass: of `nvdisasm -gp -c`; shared: bytes that the launch
    asks for besides the static ones.
    """
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    found = Resources(
        registers=int(numbers["REG"]),
        spilled=int(numbers["STACK"]) + int(numbers["LOCAL"]),
        shared=int(numbers["SHARED"]) + shared,
        unfenced=unfenced_loops(sass),
        warps=int(_search(r'"ttg\.num-warps" = (\d+)', ttgir)),
    )
    by_place = defaultdict(list)
    for access in accesses(ttgir):
        by_place[access.kind, access.place].append(access)
    places = ptx_places(ptx)
    products: Counter[str] = Counter()
    line = 0
    for text in sass.splitlines():
        mark = _PTX_LINE.search(text)
        if mark is not None:
            line = int(mark[1])
            continue
        instruction = _INSTRUCTION.match(text)
        if instruction is None:
            continue
        mnemonic = instruction[1]
        name = mnemonic.partition(".")[0]
        if name in _LOCAL:
            found.spilled = max(found.spilled, 1)
        elif name in _PRODUCTS:
            products[name] += 1
        elif name in _BULK:
            found.bulk += 1
        elif name in _GLOBAL:
            place = places[line] if line < len(places) else ()
            _count(found.traffic, _GLOBAL[name], by_place[_GLOBAL[name], place], width_of(mnemonic))
    found.products = dict(products)
    return found


def _count(traffic: dict[str, Traffic], kind: str, candidates: list[Access], width: int) -> None:
    """Add one instruction to the argument it belongs to."""
    pointer = "|".join(sorted({access.pointer for access in candidates})) or UNKNOWN
    entry = traffic.setdefault(f"{kind} {pointer}", Traffic())
    entry.item = max([entry.item, *(access.item for access in candidates)])
    lanes = [access.lane for access in candidates if access.lane is not None]
    if candidates and not lanes:
        entry.scalars += 1
        return
    lane = max(lanes, default=16.0)
    for i, (bits, bytes_, count) in enumerate(entry.blocks):
        if (bits, bytes_) == (width, lane):
            entry.blocks[i] = (bits, bytes_, count + 1)
            return
    entry.blocks.append((width, lane, 1))


def amd_resources(amdgcn: str) -> Resources:
    """Registers (vector), spills and LDS from the metadata of AMD assembly."""

    def number(name: str) -> int:
        return int(_search(rf"\.{name}:\s+(\d+)", amdgcn))

    return Resources(
        registers=number("vgpr_count"),
        spilled=number("private_segment_fixed_size") + number("vgpr_spill_count"),
        shared=number("group_segment_fixed_size"),
        warps=number("max_flat_workgroup_size") // number("wavefront_size"),
    )


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"aot: no {pattern} in the compiler's output: {text[:200]!r}")
    return match[1]
