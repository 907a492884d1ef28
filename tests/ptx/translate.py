"""PTX to C++: each .entry becomes a function that one thread of a kernel runs (see device.h).

Registers hold bits, and an instruction says how it reads them. What is not modelled is refused:
an opcode, a modifier, a directive. So a new compiler shows as an error, never as a wrong number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# The types of PTX in C++; those of registers are unsigned, of the same size.
TYPES = {
    "pred": "bool",
    "f16": "_Float16",
    "bf16": "bfloat16",
    "f32": "float",
    "f64": "double",
    "f16x2": "_Float16",
    "bf16x2": "bfloat16",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
}
SIZES = {name: int((re.findall(r"\d+", name) or [8])[0]) // 8 for name in TYPES}
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
# All that PTX may say about caches and ordering of an access by one thread.
HINTS = {"global", "nc", "wb", "cg", "ca", "cs", "lu", "cv", "wt", "relaxed", "weak", "volatile"}
HINTS |= {"gpu", "cta", "sys", "L1::evict_first", "L1::evict_last", "L1::no_allocate"}
HINTS |= {"L1::evict_normal", "L2::cache_hint"}

# Opcode, and the modifiers it may have beside its type: a function of device.h of that name takes
# its operands. `approx` and `full` allow an error of a unit or two; the exact result is among them.
ROUNDED = {"rn", "approx", "full"}
ROUNDED_OPS = ("add", "sub", "mul", "fma", "sqrt", "rcp", "div", "rsqrt")
OTHER_OPS = ("rem", "neg", "abs", "and", "or", "xor", "not", "shl", "shr", "min", "max", "popc")
OTHER_OPS += ("clz", "bfe", "selp")
CONDITIONS = {"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"}
CONDITIONS |= {"equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"}
SPECIAL = {"tid", "ntid", "ctaid", "nctaid"}


class NotModelled(ValueError):
    """Something in the PTX that is not known here."""


@dataclass
class Entry:
    """One kernel of a PTX file."""

    name: str
    text: str  # from .entry to the closing brace
    outside: str  # declarations of the file

    @property
    def neutral(self) -> str:
        """The text without the name, which has a hash of the file's path in it."""
        return self.text.replace(self.name, "entry")

    @property
    def directives(self) -> dict[str, int]:
        head = self.text[: self.text.index("{")]
        found = re.findall(r"\.(maxntid|reqntid|minnctapersm|maxnreg)\s+([\d, ]+)", head)
        numbers = {name: [int(n) for n in values.split(",")] for name, values in found}
        return {name: n[0] * (n[1] if len(n) > 1 else 1) for name, n in numbers.items()}


def entries(ptx: str) -> dict[str, Entry]:
    found: dict[str, str] = {}
    outside, position = "", 0
    for match in re.finditer(r"(?:\.visible\s+)?\.entry\s+(\w+)", ptx):
        depth, end = 0, ptx.index("{", match.end())
        while True:
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
            if depth == 0:
                break
        found[match[1]] = ptx[match.start() : end]
        outside += ptx[position : match.start()]
        position = end
    pattern = r"^\s*(?:(?:\.extern )?\.(?:global|shared)|\.extern \.func)\b[^;]*;"
    declared = re.findall(pattern, outside, re.MULTILINE)
    return {name: Entry(name, text, "\n".join(declared)) for name, text in found.items()}


def header(ptx: str) -> str:
    """What makes the text of one entry a file that ptxas takes, if no line refers to a source."""
    head = "\n".join(re.findall(r"^\.(?:version|target|address_size).*$", ptx, re.MULTILINE))
    return head.replace(", debug", "")


def without_sources(text: str) -> str:
    return re.sub(r"^[ \t]*\.loc\b[^\n]*", "", text, flags=re.MULTILINE)


def statements(body: str) -> Iterator[tuple[int, str]]:
    """Labels (with their colon), braces and instructions, with their lines."""
    body = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), body, flags=re.DOTALL)
    body = without_sources(body)
    pattern = re.compile(r"\s*(?:([$\w%]+:)|([{}])|([^;]*?);)", re.DOTALL)
    position = 0
    while match := pattern.match(body, position):
        position = match.end()
        start = match.start(match.lastindex or 0)
        text = " ".join((match[1] or match[2] or match[3]).split())
        if text:
            yield body.count("\n", 0, start) + 1, text
    if body[position:].strip():
        raise NotModelled(body[position:].strip()[:80])


@dataclass
class Translator:
    entry: Entry
    registers: dict[str, str] = field(default_factory=dict)  # PTX name: its type in C++
    parameters: dict[str, int] = field(default_factory=dict)  # name: offset
    sizes: list[tuple[int, int]] = field(default_factory=list)  # of parameters: offset, bytes
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    loads: int = 0
    pending: dict[str, set[int]] = field(default_factory=dict)  # register: loads it may come from
    line: int = 0

    # ---- declarations ----------------------------------------------------------------------------

    def head(self, text: str) -> None:
        at = 0
        for align, kind, name, count in re.findall(
            r"\.param (?:\.align (\d+) )?\.(\w+) (?:\.ptr[^,)]*? )?(\w+)(?:\[(\d+)\])? ?(?=[,)])",
            " ".join(text.split()),
        ):
            size = SIZES[kind] * int(count or 1)
            step = int(align or SIZES[kind])
            at = -(-at // step) * step
            self.parameters[name] = at
            self.sizes.append((at, size))
            at += size
        if len(self.sizes) != text.count(".param"):
            raise NotModelled(f"parameters: {text}")

    def declare(self, text: str) -> bool:
        if found := re.fullmatch(r"\.reg \.(\w+) (.*)", text):
            kind = "b16" if found[1] in ("b8", "u8", "s8") else found[1]
            register = "bool" if kind == "pred" else f"uint{SIZES[kind] * 8}_t"
            for name in found[2].split(","):
                ranged = re.fullmatch(r"(%?\w+)<(\d+)>", name.strip())
                names = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]
                self.registers.update((n.strip(), register) for n in names)
            return True
        if found := re.search(r"\.shared (?:\.align (\d+) )?\.(\w+) (\w+)\[(\d*)\]", text):
            step = int(found[1] or SIZES[found[2]])
            self.shared_bytes = -(-self.shared_bytes // step) * step
            self.shared[found[3]] = self.shared_bytes
            self.shared_bytes += SIZES[found[2]] * int(found[4] or 0)
            return True
        # What is put together for a call of __assertfail, the one function that is known.
        return bool(
            re.match(r"\.param |\.pragma \"(nounroll|used_bytes_mask)|\.extern \.func", text)
        )

    # ---- operands --------------------------------------------------------------------------------

    def value(self, operand: str) -> str:
        """Bits."""
        operand = operand.strip()
        if operand in self.registers:
            return self.variable(operand)
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return f"uint32_t{{0x{found[1]}u}}"
        if found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return f"uint64_t{{0x{found[1]}ull}}"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            return f"uint64_t({operand.rstrip('U')}ll)"
        for addresses in (self.shared, self.parameters):
            if operand in addresses:
                return f"uint64_t{{{addresses[operand]}}}"
        found = re.fullmatch(r"%(\w+)\.([xyz])", operand)
        if found and found[1] in SPECIAL:
            return f"t.{found[1]}.{found[2]}"
        if operand == "%laneid":
            return "t.lane()"
        if re.search(rf"\.global [^;]*\b{re.escape(operand)}\b", self.entry.outside):
            return "uint64_t{0}"  # texts of assertions: their address is only handed on
        raise NotModelled(f"operand {operand}")

    def variable(self, register: str) -> str:
        return "r_" + register.lstrip("%")

    def address(self, operand: str) -> str:
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise NotModelled(f"address {operand}")
        return f"({self.value(found[1])} + ({found[2] or 0}ll))"

    def read(self, kind: str, operand: str) -> str:
        return f"as<{TYPES[kind]}>({self.value(operand)})"

    def write(self, operand: str, kind: str, value: str) -> str:
        """A register takes a value of a type: extended if it is wider, by sign if that has one."""
        if operand == "_":
            return f"(void)({value});"
        register = self.registers[operand]
        return f"{self.variable(operand)} = widened<{register}>({TYPES[kind]}({value}));"

    # ---- instructions ----------------------------------------------------------------------------

    def instruction(self, opcode: str, operands: list[str]) -> str:
        name, *modifiers = (
            re.findall(r"[\w:]+?(?=\.|$)", opcode) if "::" not in opcode else opcode.split(".")
        )
        kinds = [m for m in modifiers if m in TYPES]
        others = {m for m in modifiers if m not in TYPES}
        kind = kinds[0] if kinds else ""

        def only(*allowed: str) -> None:
            if others - set(allowed):
                raise NotModelled(opcode)

        def call(function: str, kinds: list[str], first: int = 1) -> str:
            arguments = zip(kinds, operands[first:], strict=True)
            return f"{function}({', '.join(self.read(k, o) for k, o in arguments)})"

        if name in ("ld", "st"):
            return self.access(name, kind, others, operands)
        if name == "mov":
            only()
            return self.move(kind, *operands)
        if name in ("add", "sub", "mul", "fma") and others == {"rn", "f32x2"}:
            values = ", ".join(self.read("b64", o) for o in operands[1:])
            pairs = f"of_pairs([](auto... x) {{ return op_{name}(x...); }}, {values})"
            return self.write(operands[0], "b64", pairs)
        if (
            name in ("add", "sub", "fma")
            and kinds[:1] == ["f32"]
            and others == {"rn"}
            and kinds[1:]
        ):
            # All but the last are of a narrower type.
            narrow = [f"converted<float>({self.read(kinds[1], o)})" for o in operands[1:-1]]
            values = ", ".join([*narrow, self.read("f32", operands[-1])])
            return self.write(operands[0], "f32", f"op_{name}({values})")
        if name in (*ROUNDED_OPS, *OTHER_OPS) and len(kinds) == 1:
            if name == "mul" and kind[0] in "us":
                only("lo", "hi", "wide")
                (form,) = others
                if form == "wide":
                    wide = WIDER[kind]
                    a, b = (self.read(kind, o) for o in operands[1:])
                    return self.write(operands[0], wide, f"{TYPES[wide]}({a}) * {b}")
                return self.write(operands[0], kind, call(f"mul_{form}", [kind] * 2))
            if opcode == "sqrt.approx.ftz.f32":
                return self.write(operands[0], kind, call("sqrt_ftz", [kind]))
            only(*(ROUNDED if name in ROUNDED_OPS else ()))
            kinds = [kind] * (len(operands) - 1)
            if name in ("shl", "shr"):
                kinds[1] = "u32"
            elif name == "selp":
                kinds[2] = "pred"
            elif name == "bfe":
                kinds[1] = kinds[2] = "u32"
            result = "u32" if name in ("popc", "clz") else kind
            return self.write(operands[0], result, call(f"op_{name}", kinds))
        if name == "mad" and kind[0] in "us":
            only("lo", "wide")
            wide = WIDER[kind] if "wide" in others else kind
            factors = (
                f"{TYPES[wide]}({self.read(kind, operands[1])}) * {self.read(kind, operands[2])}"
            )
            return self.write(operands[0], wide, f"{factors} + {self.read(wide, operands[3])}")
        if name == "setp":
            (condition,) = others & CONDITIONS
            only(condition, "and", "or")
            if "|" in operands[0]:  # halves: the low ones, the high ones
                return self.compare_halves(condition, kind, operands)
            unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(condition, condition)
            a, b = (self.read(kind, o) for o in operands[1:3])
            if kind == "bf16":
                a, b = f"converted<float>({a})", f"converted<float>({b})"
            compared = f"compare_{unsigned}({a}, {b})"
            if len(operands) == 4:
                operator = "&&" if "and" in others else "||"
                compared = f"({compared}) {operator} {self.read('pred', operands[3])}"
            return self.write(operands[0], "pred", compared)
        if name == "cvt":
            only("rn", "rzi", "sat" if kind[0] in "us" else "rn")
            if kind in ("f16x2", "bf16x2") and kinds[1] == "f32":  # the first operand comes high
                half = TYPES[kind.removesuffix("x2")]
                high, low = (
                    f"widened<uint32_t>(converted<{half}>({self.read('f32', o)}))"
                    for o in operands[1:]
                )
                return self.write(operands[0], "b32", f"{high} << 16 | {low}")
            if others == {"rn"} or not others or (others == {"rzi"} and kind[0] in "us"):
                source = self.read(kinds[1], operands[1])
                return self.write(operands[0], kind, f"converted<{TYPES[kind]}>({source})")
        if name == "cvta":  # addresses of global memory are generic ones
            only("to", "global")
            return self.write(operands[0], "u64", self.read("u64", operands[1]))
        if name == "prmt":
            return self.write(operands[0], "b32", call("prmt", ["b32"] * 3))
        if name == "lop3":
            only()
            return self.write(operands[0], "b32", call("lop3", ["b32"] * 4))
        if name == "shf" and others == {"l", "wrap"}:
            return self.write(operands[0], "b32", call("shf_l", ["b32"] * 3))
        if name == "shfl":
            only("sync", "bfly", "idx", "down", "up")
            (form,) = others - {"sync"}
            target, _, inside = operands[0].partition("|")
            texts = [self.read("b32", o) for o in operands[1:]]
            code = f"auto [v, ok] = t.shuffle({self.line}, Shuffle::{form}, {', '.join(texts)});"
            code += self.write(target, "b32", "v")
            return (
                "{ " + code + (self.write(inside, "pred", "ok") if inside else "(void)ok;") + " }"
            )
        if name == "vote":
            only("sync", "ballot")
            vote, mask = self.read("pred", operands[1]), self.read("b32", operands[2])
            return self.write(operands[0], "b32", f"t.ballot({self.line}, {vote}, {mask})")
        if opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned") and operands == ["0"]:
            return f"t.barrier({self.line});"
        if opcode == "bar.warp.sync":
            return f"t.warp_barrier({self.line}, {self.read('b32', operands[0])});"
        form = r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16"
        if (found := re.fullmatch(form, opcode)) and (found[1] == "ld" or not found[3]):
            return self.matrix(found[1], int(found[2]), bool(found[3]), operands)
        raise NotModelled(opcode)

    def compare_halves(self, condition: str, kind: str, operands: list[str]) -> str:
        if kind not in ("f16x2", "bf16x2") or len(operands) != 3:
            raise NotModelled(f"setp.{condition}.{kind}")
        code = ""
        for i, target in enumerate(operands[0].split("|")):
            bits = (f"uint16_t({self.read('b32', o)} >> {16 * i})" for o in operands[1:])
            a, b = (f"converted<float>(as<{TYPES[kind]}>({part}))" for part in bits)
            code += self.write(target, "pred", f"compare_{condition}({a}, {b})")
        return "{ " + code + " }"

    def matrix(self, direction: str, count: int, transposed: bool, operands: list[str]) -> str:
        if direction == "st":
            values = ", ".join(self.read("b32", o) for o in self.vector(operands[1]))
            where = f"{self.line}, {self.address(operands[0])}"
            return f"t.store_matrix<{count}>({where}, {{{{{values}}}}});"
        load = "load_transposed" if transposed else "load_matrix"
        code = f"auto v = t.{load}<{count}>({self.line}, {self.address(operands[1])});"
        registers = self.vector(operands[0])
        code += "".join(self.write(r, "b32", f"v.v[{i}]") for i, r in enumerate(registers))
        return "{ " + code + " }"

    def vector(self, operand: str) -> list[str]:
        return [part.strip() for part in operand.strip("{} ").split(",")]

    def access(self, name: str, kind: str, others: set[str], operands: list[str]) -> str:
        # A generic address of global memory is the same number; one of other memory would be
        # reported, as outside of any tensor.
        spaces = ("global", "shared", "param", "local", "const")
        space = next((s for s in spaces if s in others or f"{s}::cta" in others), "global")
        count = next((int(m[1]) for m in others if re.fullmatch(r"v[248]", m)), 1)
        if space in ("local", "const") or others - HINTS - {space, f"{space}::cta", f"v{count}"}:
            raise NotModelled(f"{name} {others}")
        place, target = (operands[1], operands[0]) if name == "ld" else operands[:2]
        if space == "param" and name == "st":  # an argument of __assertfail
            return ""
        where = f"{self.line}, address"
        begin = f"const uint64_t address = {self.address(place)}; "
        if space == "param":
            code = begin + f"auto v = t.parameter<{TYPES[kind]}, {count}>(address);"
            writes = (self.write(r, kind, f"v.v[{i}]") for i, r in enumerate(self.vector(target)))
            return "{ " + code + "".join(writes) + " }"
        if name == "st":
            values = ", ".join(self.read(kind, v) for v in self.vector(target))
            store = f"t.store_{space}<{TYPES[kind]}, {count}>({where}, {{{{{values}}}}});"
            return begin + store
        registers = self.vector(target)
        code = begin + f"auto v = t.load_{space}<{TYPES[kind]}, {count}>({where});"
        code += "".join(self.write(r, kind, f"v.v[{i}]") for i, r in enumerate(registers))
        if space == "global":
            for register in registers:
                self.pending.setdefault(register, set()).add(self.loads)
            code += f" LOADED({self.loads}, {count * SIZES[kind]}, address);"
            self.loads += 1
        return "{ " + code + " }"

    def move(self, kind: str, target: str, source: str) -> str:
        if target.startswith("{"):
            parts = self.vector(target)
            bits = SIZES[kind] * 8 // len(parts)
            whole = f"auto whole = {self.read(kind, source)};"
            shifts = (
                self.write(p, f"b{bits}", f"whole >> {i * bits}") for i, p in enumerate(parts)
            )
            return "{ " + whole + "".join(shifts) + " }"
        if source.startswith("{"):
            parts = self.vector(source)
            bits = SIZES[kind] * 8 // len(parts)
            each = (
                f"{TYPES[kind]}({self.read(f'b{bits}', p)}) << {i * bits}"
                for i, p in enumerate(parts)
            )
            return self.write(target, kind, " | ".join(each))
        return self.write(target, kind, self.read(kind, source))

    def trace_moves(self, found: list[tuple[int, str]]) -> None:
        """Which registers hold what a load brought: it, and what it was only moved to."""
        changed = True
        while changed:
            changed = False
            for _, text in found:
                if moved := re.match(r"(?:@!?%?\w+ )?mov\.\S+ (.*)", text):
                    names = re.findall(r"%\w+", moved[1])
                    parts = 1 if not moved[1].startswith("{") else moved[1].index("}")
                    targets = names[:1] if parts == 1 else re.findall(r"%\w+", moved[1][:parts])
                    origins = set().union(
                        *(self.pending.get(n, set()) for n in names if n not in targets)
                    )
                    for name in targets:
                        if origins - self.pending.get(name, set()):
                            self.pending.setdefault(name, set()).update(origins)
                            changed = True

    def used(self, opcode: str, operands: list[str]) -> str:
        if opcode.startswith("mov"):
            return ""
        sources = operands if opcode.startswith("st") else operands[1:]
        names = re.findall(r"%\w+", " ".join(sources))
        loads = sorted(set().union(*(self.pending.get(n, set()) for n in names)))
        return "".join(f"USED({load}); " for load in loads)

    def translate(self) -> str:
        text = self.entry.text
        brace = text.index("{")
        self.head(text[: text.index(")", text.index("(")) + 1] if "(" in text[:brace] else "()")
        for line in self.entry.outside.splitlines():
            if ".shared" in line:
                self.declare(line.strip().rstrip(";"))
        before = text[:brace].count("\n")
        found = list(statements(text[brace + 1 : -1]))
        lines: list[tuple[str, str, list[str]]] = []
        for number, statement in found:
            self.line = before + number
            try:
                lines.append(self.statement(statement))
            except (NotModelled, KeyError, ValueError) as error:
                raise NotModelled(f"line {self.line}: {statement}: {error}") from error
        self.trace_moves(found)
        body = []
        for code, opcode, operands in lines:
            use = self.used(opcode, operands) if opcode else ""
            body.append(code.replace("USES", use))
        registers = "".join(
            f"  {kind} {self.variable(name)} = 0;\n" for name, kind in self.registers.items()
        )
        threads = self.entry.directives
        most = threads.get("reqntid", threads.get("maxntid", 1024))
        sizes = ", ".join(f"{{{at}, {size}}}" for at, size in self.sizes) or "{0, 0}"
        return (
            '#include "device.h"\nusing namespace ptx;\n'
            f"static void run(Thread& t) {{\n{registers}  COUNTED({self.loads + 1});\n"
            + "\n".join(body)
            + "\n}\n"
            + f"static const Parameter parameters[] = {{{sizes}}};\n"
            + 'extern "C" const Kernel kernel = {run, parameters, '
            + f"{len(self.sizes)}, {self.shared_bytes}, "
            + f"{most}, {int('reqntid' in threads)}}};\n"
        )

    def statement(self, text: str) -> tuple[str, str, list[str]]:
        if text in "{}":
            return "", "", []
        if text.endswith(":"):
            return f"{self.label(text[:-1])}:;", "", []
        if text.startswith("."):
            if not self.declare(text):
                raise NotModelled(text)
            return "", "", []
        guard = ""
        if found := re.match(r"@(!?)(%?\w+) (.*)", text):
            guard = f"if ({found[1]}{self.value(found[2])}) "
            text = found[3]
        opcode, _, rest = text.partition(" ")
        # Commas between operands, not those inside of braces.
        operands = [o.strip() for o in re.findall(r"(?:\{[^}]*\}|[^,{])+", rest)]
        if opcode in ("bra", "bra.uni"):
            return f"  {guard}goto {self.label(operands[0])};", "", []
        if opcode == "ret" or opcode == "exit":
            return f"  {guard}return;", "", []
        if opcode == "trap":
            return f'  {guard}t.fault({self.line}, "the kernel trapped");', "", []
        if opcode == "call.uni" and operands[0] == "__assertfail":
            return f'  {guard}t.fault({self.line}, "a device assertion failed");', "", []
        code = self.instruction(opcode, operands)
        return f"  {guard}{{ USES{code} }}", opcode, operands

    def label(self, name: str) -> str:
        return name.replace("$", "L")


def translate(entry: Entry) -> str:
    return Translator(entry).translate()
