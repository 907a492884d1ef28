"""The benchmarks: their arithmetic, their providers, and what they refuse."""

import doctest
import importlib
import json
import shutil
import subprocess
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# Nothing here is needed to use the package.
for package in ("matplotlib", "pytest_benchmark", "rich", "sklearn"):
    pytest.importorskip(package)

from benchmarks.cases import blocks, compiled, kernels, ops, presets  # noqa: E402
from benchmarks.measure import correctness, ending, flops, memory, store, workload  # noqa: E402
from benchmarks.providers import networks, residuals  # noqa: E402
from benchmarks.report import figures, targets  # noqa: E402
from benchmarks.run import parse_arguments  # noqa: E402
from sdkernels.backends import traceable  # noqa: E402

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY_BLOCK = blocks.BlockCase(presets.TINY, 8, 0.5)


def record(kind, turns, baseline=None, floor=None, **described):
    """A case as the harness keeps it: seconds of every provider, a list for each repeat."""
    extras = described.pop("extras", {})
    return {
        "case": {"name": "c", "kind": kind, "baseline": baseline, "floor": floor, **described},
        "skipped": {},
        "turns": {
            provider: [{"wall": samples, "host": [], "device": []} for samples in repeats]
            for provider, repeats in turns.items()
        },
        "extras": extras,
    }


# From samples to figures


def test_merge():
    merged = figures.merge([[1.0, 1.1, 1.2], [1.3, 1.0, 1.4]])
    assert merged.median == pytest.approx(1.15)
    assert (merged.p20, merged.p80) == pytest.approx((1.0, 1.3))
    assert merged.turn_medians == (1.1, 1.3)
    assert merged.spread == pytest.approx(0.1 / 1.15)
    assert (merged.low, merged.high, merged.samples) == (1.0, 1.4, 6)


def test_merge_refuses_no_samples():
    with pytest.raises(ValueError, match="at least one sample"):
        figures.merge([[]])


def test_block_ratios():
    times = {
        "naive": [[4.0, 4.0], [4.0, 4.0]],
        "fused": [[2.0, 2.0], [2.2, 2.2]],
        "dense": [[2.0, 2.0], [2.0, 2.0]],
    }
    kept = {"naive": 1000, "fused": 550, "dense": 500}
    extras = {
        name: {"memory": {"kind": memory.SAVED, "bytes": size}, "flops": 8}
        for name, size in kept.items()
    }
    (case,) = figures.collect([record("block", times, "naive", "dense", extras=extras)])
    fused = case["providers"]["fused"]
    assert fused["median"] == pytest.approx(2.1)
    assert fused["speedup"] == pytest.approx(4.0 / 2.1)
    assert fused["over_floor"] == pytest.approx(1.05)
    assert fused["over_floor_turns"] == pytest.approx((1.0, 1.1))
    assert fused["memory_of_baseline"] == pytest.approx(0.55)
    assert fused["flops"] == 8
    assert fused["host"] is None
    assert case["providers"]["naive"]["speedup"] == 1.0


def test_op_bandwidth_is_net_of_the_empty_backward():
    times = {"fused": 5.0, "torch": 9.0, "copy": 4.0, "empty": 1.0}
    turns = {name: [[seconds]] for name, seconds in times.items()}
    described = {"traffic_bytes": 300, "copy_bytes": 400}
    (result,) = figures.collect([record("op", turns, "torch", **described)])
    fused = result["providers"]["fused"]
    # The copy moves 100 bytes per second, the op 300 bytes in 5 - 1 seconds.
    assert fused["of_copy_bandwidth"] == pytest.approx(0.75)
    assert fused["speedup"] == pytest.approx(1.8)
    assert "of_copy_bandwidth" not in result["providers"]["copy"]


def test_host_cost_is_the_extra_over_plain():
    turns = {"plain": [[10.0]], "naive": [[14.0]], "fused": [[16.0]]}
    (case,) = figures.collect([record("host", turns, "naive", "plain")])
    assert case["providers"]["fused"]["extra"] == pytest.approx(6.0)
    assert case["providers"]["fused"]["extra_of_baseline"] == pytest.approx(1.5)


def test_ideal_of_a_model():
    # 8 of 10 seconds are in the branches, and half of the rows run them: 2 + 8 / 2.
    turns = {"naive": [[11.0]], "undropped": [[10.0]], "skeleton": [[2.0]], "fused": [[6.6]]}
    (case,) = figures.collect([record("model", turns, "naive", "dense", k=2, batch=4)])
    assert case["share_of_branches"] == pytest.approx(0.8)
    assert case["ideal_speedup"] == pytest.approx(10 / 6)
    assert case["providers"]["fused"]["of_ideal"] == pytest.approx(6 / 6.6)


def test_clocks_of_a_gpu():
    kept = record("block", {"fused": [[3.0, 3.0]]})
    kept["turns"]["fused"][0] |= {"host": [1.0, 1.2], "device": [2.0, 2.5]}
    (case,) = figures.collect([kept])
    assert case["providers"]["fused"]["host"] == pytest.approx(1.1)
    assert case["providers"]["fused"]["device"] == pytest.approx(2.25)


# Targets

BANDWIDTH = "bandwidth / copy's"
DINO = "DINOv2 style / fused"
FLOOR = "fused / dense on k"
HALVES = "slower / faster of bf16 and fp16"
IDEAL = "ideal / fused"
INPLACE = "fused / fused in place"
KERNEL = "PyTorch's calls / kernel"
MEMORY = "memory, fused / naive"
MODEL_FLOOR = "fused / branches on k beside the stream"
NEVER_SLOWER = "naive / fused, min_saving auto"
NORM_KERNEL = "PyTorch's calls / norm kernel"
SPEEDUP = "naive / fused"
STACK = "fused / dense on k, 48 small branches"


@pytest.mark.parametrize(
    ("measured", "at_most", "met", "gap"),
    [
        (1.02, True, True, 0.0),
        (1.122, True, False, 0.1),
        (1.122, False, True, -0.1),
        (0.918, False, False, 0.1),
        (None, True, None, None),
    ],
)
def test_targets(measured, at_most, met, gap):
    outcome = targets.Outcome("t", "c", 1.02, at_most, "x", measured)
    assert outcome.met is met
    assert outcome.gap == pytest.approx(gap)


def test_noise_counts_only_where_it_is_allowed():
    assert not targets.Outcome("t", "c", 1.0, False, "x", 0.99, 0.97, 1.01).met
    assert targets.Outcome("t", "c", 1.0, False, "x", 0.99, 0.97, 1.01, noise=True).met
    assert not targets.Outcome("t", "c", 1.0, False, "x", 0.9, 0.85, 0.95, noise=True).met


def test_targets_of_a_block():
    turns = {
        "naive": [[4.0]],
        "dinov2": [[1.9]],
        "dense": [[2.0]],
        "beside": [[2.08]],
        "fused": [[2.1]],
        "fused-fixed": [[2.0]],
        "fused-auto": [[2.0]],
    }
    described = {"keep": 0.5, "block": "vit-D8-N4", "k": 2, "batch": 4}
    cases = figures.collect([record("block", turns, "naive", "dense", **described)])
    outcomes = {outcome.target: outcome for outcome in targets.outcomes(cases)}
    assert outcomes[FLOOR].floor == pytest.approx(1.04)
    assert outcomes[SPEEDUP].floor == pytest.approx(2.0)
    assert {target: outcome.met for target, outcome in outcomes.items()} == {
        FLOOR: False,
        SPEEDUP: False,
        NEVER_SLOWER: True,
        DINO: False,
        MEMORY: None,
    }
    assert targets.outcomes([{"kind": "block", "name": "c", "keep": 0.5, "providers": {}}]) == []


@pytest.mark.parametrize("block", ["resnet-D8-4x4", "vit-D192-N50"])
def test_targets_of_a_block_that_computes_little(block):
    turns = {"naive": [[4.0]], "dense": [[2.0]], "beside": [[2.02]], "fused": [[2.05]]}
    described = {"keep": 0.5, "block": block, "k": 2, "batch": 4}
    cases = figures.collect([record("block", turns, "naive", "dense", **described)])
    outcomes = {outcome.target: outcome for outcome in targets.outcomes(cases)}
    assert outcomes[FLOOR].met
    assert outcomes[MODEL_FLOOR].measured == pytest.approx(2.05 / 2.02)
    assert outcomes[MODEL_FLOOR].met


def test_targets_of_a_stack():
    turns = {"naive": [[4.0]], "dense": [[2.0]], "fused": [[2.3]], "fused-inplace": [[2.2]]}
    for branches, expected in ((48, {STACK: False, INPLACE: True}), (12, {})):
        cases = figures.collect([record("depth", turns, "naive", "dense", branches=branches)])
        outcomes = {outcome.target: outcome.met for outcome in targets.outcomes(cases)}
        assert outcomes == expected


def test_targets_of_few_rows_go_by_the_rows_that_are_kept():
    # Of one row, half are one.
    turns = {name: [[1.0]] for name in ("naive", "dense", "fused")}
    described = {"keep": 0.5, "block": "vit-D8-N4", "k": 1, "batch": 1}
    cases = figures.collect([record("block", turns, "naive", "dense", **described)])
    outcomes = {outcome.target: outcome for outcome in targets.outcomes(cases)}
    assert outcomes[SPEEDUP].bound == pytest.approx(0.97)
    assert outcomes[MEMORY].bound == pytest.approx(1.05)


def test_targets_of_a_model():
    turns = {
        "naive": [[11.0]],
        "undropped": [[10.0]],
        "skeleton": [[2.0]],
        "beside": [[6.1]],
        "fused": [[6.25]],
    }
    cases = figures.collect([record("model", turns, "naive", "beside", k=2, batch=4)])
    ideal, floor = targets.outcomes(cases)
    assert (ideal.target, floor.target) == (IDEAL, MODEL_FLOOR)
    assert not ideal.met
    assert ideal.floor == pytest.approx(6 / 6.1)
    assert floor.met
    assert floor.measured == pytest.approx(6.25 / 6.1)


def kernel_record(seconds, dtype="fp32", **described):
    turns = {name: [[value]] for name, value in seconds.items()}
    described = {"norm": False, "copies": True, "in_cache": False, "dtype": dtype} | described
    sizes = {"traffic_bytes": 300, "copy_bytes": 400}
    kept = record("kernel", turns, "torch", "copy", **sizes, **described)
    kept["case"]["name"] = f"kernel-x-{dtype}-4x4-t1"
    return kept


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({}, {KERNEL: True, BANDWIDTH: False}),
        ({"in_cache": True}, {KERNEL: True}),
        ({"norm": True}, {NORM_KERNEL: False}),
        ({"norm": True, "in_cache": True}, {KERNEL: True}),
    ],
)
def test_targets_of_a_kernel(described, expected):
    # 1.1 times as fast as PyTorch, at 75 bytes a second where the copy has 100.
    kept = kernel_record({"fused": 4.0, "torch": 4.4, "copy": 4.0}, **described)
    outcomes = targets.outcomes(figures.collect([kept]))
    assert {outcome.target: outcome.met for outcome in outcomes} == expected


def test_the_two_16_bit_types_are_compared():
    pair = [
        kernel_record({"fused": seconds, "torch": 9.0, "copy": 1.0}, dtype)
        for dtype, seconds in (("bf16", 4.0), ("fp16", 5.0), ("fp32", 1.0))
    ]
    outcomes = [o for o in targets.outcomes(figures.collect(pair)) if o.target == HALVES]
    assert [(o.measured, o.met) for o in outcomes] == [(pytest.approx(1.25), False)]
    (alone,) = targets.outcomes(figures.collect(pair[:1]))[:1]
    assert alone.target != HALVES


# Presets


def test_unknown_preset_lists_the_valid_ones():
    with pytest.raises(presets.SelectionError) as error:
        presets.get_preset("fast")
    assert all(name in str(error.value) for name in ("'fast'", *presets.PRESETS))


def test_filter():
    preset = presets.PRESETS["smoke"]
    assert presets.select(preset, None) == preset.names()
    assert presets.select(preset, "host, train") == ["host-identity-8x4x16", "train-digits"]
    assert len(presets.select(preset, "op-*-bwd")) == 2
    with pytest.raises(presets.SelectionError) as error:
        presets.select(preset, "nothing")
    assert all(name in str(error.value) for name in preset.names())


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_presets_are_whole(preset):
    names = preset.names()
    assert len(names) == len(set(names))
    assert {case.kind for case in preset.cases} <= preset.rounds.keys()
    for case in preset.cases:
        described = case.describe()
        assert json.loads(json.dumps(described)).keys() == described.keys()
        providers = case.providers(CPU)
        assert case.baseline in providers
        assert case.kind == "compile" or case.floor is None or case.floor in providers


def test_full_preset_reaches_as_far_as_it_says():
    cases = presets.PRESETS["full"].cases
    kept = {case.keep for case in cases if case.kind == "block"}
    assert (min(kept), max(kept)) == (0.05, 1.0)
    batches = {case.batch for case in cases if case.kind == "block"}
    assert (min(batches), max(batches)) == (1, 1024)
    depths = {case.net.branches for case in cases if case.kind == "depth"}
    assert (min(depths), max(depths)) == (12, 1000)


# Providers


@pytest.mark.parametrize("case", presets.PRESETS["smoke"].cases, ids=lambda case: case.name)
def test_providers_compute_the_same(case):
    assert correctness.check(case, CPU) > 0


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("dtype", workload.DTYPES)
def test_ops_compute_the_same(op, dtype):
    assert correctness.check(ops.OpCase(op, "fwd", dtype, "tiny", (8, 16, 32), 4), CPU) > 0


@pytest.mark.parametrize("shape", [(8, 16, 32), (8, 16, 6, 6)], ids=["tokens", "images"])
@pytest.mark.parametrize("dtype", [*workload.DTYPES, "mixed"])
@pytest.mark.parametrize("op", kernels.KERNELS)
def test_kernels_compute_the_same(op, dtype, shape):
    assert correctness.check(kernels.KernelCase(op, dtype, shape), CPU) > 0


def test_kernels_are_timed_on_the_threads_that_they_say():
    before = torch.get_num_threads()
    loads = kernels.KernelCase("compact", "fp32", (8, 16, 32), before + 1).workloads(CPU)
    with loads["fused"].context():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("cache", "kind", "whole", "expected"),
    [(2**25, "cpu", False, 65), (2**29, "cpu", False, 129), (2**29, "cpu", True, 256),
     (2**27, "cuda", False, 256)],
)  # fmt: skip
def test_of_a_huge_cache_a_part_is_filled(cache, kind, whole, expected, monkeypatch):
    """A virtual machine names its host's: a quick run would take twice as long for it."""
    monkeypatch.setattr(workload, "last_cache_bytes", lambda device: cache)
    copies = workload.copies_past_the_cache(2**20, torch.device(kind), whole)
    assert copies == expected


def test_a_kernel_that_computes_something_else_is_not_timed(monkeypatch):
    case = kernels.KernelCase("compact", "fp32", (8, 16, 32))
    wrong = replace(kernels.KERNELS["compact"], fused=lambda t: 1.01 * t.x.index_select(0, t.index))
    monkeypatch.setitem(kernels.KERNELS, "compact", wrong)
    with pytest.raises(correctness.ProviderMismatch, match="output 0"):
        correctness.check(case, CPU)


def test_convolutions_are_compared_in_fp32(monkeypatch):
    """cuDNN's default, TF32, differs by more than the tolerance between B rows and k."""
    allowed = []
    case = blocks.BlockCase(presets.TINY, 8, 0.5, "fp32")
    compare = type(case).comparisons

    def comparisons(self, device):
        for each in compare(self, device):
            allowed.append(torch.backends.cudnn.allow_tf32)
            yield each

    monkeypatch.setattr(type(case), "comparisons", comparisons)
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        assert correctness.check(case, CPU) > 0
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert allowed
    assert not any(allowed)


@pytest.mark.parametrize(
    ("keep", "dtype"), [(0.125, "fp32"), (1.0, "fp32"), (0.95, "fp32"), (0.5, "mixed")]
)
def test_blocks_compute_the_same(keep, dtype):
    assert correctness.check(blocks.BlockCase(presets.TINY, 8, keep, dtype), CPU) > 0


@pytest.mark.whole
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_compiled_providers_compute_the_same():
    case = compiled.CompileCase(presets.TINY, 8, keep=0.5, counts=compiled.STATIC)
    assert correctness.check(case, CPU) > 0


@pytest.mark.skipif(not networks.HAS_LIBRARIES, reason="blocks of timm and torchvision")
@pytest.mark.parametrize("net", presets.TINY_NETS, ids=lambda net: net.family)
def test_floor_beside_the_stream_computes_all_of_a_branch(net):
    # As it is timed: where no gradient of the branch's input is asked for by name.
    loads = blocks.BlockCase(net, 8, keep=0.5).workloads(CPU)
    assert flops.count(loads["beside"].run) == flops.count(loads["fused"].run) > 0


def wrong_scale(x, branch, p, *, norm, layer_scale, rows):
    out = layer_scale * branch(norm(x[rows.index]))
    return x.index_add(0, rows.index, out, alpha=1.01 * rows.scale)


def wrong_gradient(x, branch, p, *, norm, layer_scale, rows):
    out = layer_scale.detach() * branch(norm(x[rows.index])) + 0 * layer_scale
    return x.index_add(0, rows.index, out, alpha=rows.scale)


def not_a_number(x, branch, p, *, norm, layer_scale, rows):
    return wrong_scale(x, branch, p, norm=norm, layer_scale=layer_scale, rows=rows) * float("nan")


@pytest.mark.parametrize(
    ("provider", "what"),
    [
        (wrong_scale, "output"),
        (wrong_gradient, "gradient of scale1"),
        (not_a_number, "output"),
    ],
)
def test_wrong_provider_is_refused(monkeypatch, provider, what):
    monkeypatch.setitem(residuals.RULES, "wrong", (provider, False))
    with pytest.raises(correctness.ProviderMismatch, match=rf"'wrong' differs .* its {what}"):
        correctness.check(TINY_BLOCK, CPU)


@pytest.mark.parametrize("rule", ["naive", "dinov2", "dinov3", "fused-fixed"])
def test_rules_draw_for_themselves(rule):
    """As many rows as they promise on average, and those scaled by one over their share."""
    torch.manual_seed(0)
    x = torch.zeros(400, 1)
    y = residuals.RULES[rule][0](x, lambda kept: kept + 1, 0.25)
    kept = (y != 0).double().mean().item()
    assert kept == pytest.approx(0.75, abs=0.08)
    assert y.max().item() == pytest.approx(4 / 3)


class DocumentedXformers:
    """What xFormers' two functions do, after their documentation."""

    @staticmethod
    def index_select_cat(sources, indices):
        pairs = zip(sources, indices, strict=True)
        return torch.cat([source[index].flatten() for source, index in pairs])

    @staticmethod
    def scaled_index_add(input, index, source, scaling=None, alpha=1.0):
        scaled = source if scaling is None else scaling * source
        return input.index_add_(0, index, scaled, alpha=alpha)


def documented_layer_norm_fn(x, weight, bias, residual, eps, rowscale, prenorm):
    """What flash-attn's fused addition and norm does, after its reference code."""
    total = x * rowscale.unsqueeze(-1) + residual
    return torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps), total


def test_peers_whose_packages_are_for_cuda(monkeypatch):
    """Their rules are right if the packages do what they say: nothing here can run them."""
    monkeypatch.setitem(sys.modules, "xformers.ops", DocumentedXformers)
    layer_norm = types.ModuleType("flash_attn.ops.triton.layer_norm")
    layer_norm.layer_norm_fn = documented_layer_norm_fn
    monkeypatch.setitem(sys.modules, "flash_attn.ops.triton.layer_norm", layer_norm)
    for module in (blocks, ops):
        monkeypatch.setattr(module, "why_missing", lambda package, device: None)
    cases = [TINY_BLOCK]
    cases += [
        ops.OpCase(op, "fwd", "fp32", "tiny", (8, 16, 32), 4)
        for op in ("compact", "scatter_add", "scatter_add_layer_scale", "scatter_add_then_norm")
    ]
    checked = [c.provider for case in cases for c in case.comparisons(CPU)]
    assert checked.count("xformers") == 4
    assert checked.count("flash_attn") == 1
    for case in cases:
        assert correctness.check(case, CPU) > 0


def test_peers_are_skipped_by_name():
    assert TINY_BLOCK.providers(CPU)["xformers"] in ("not installed", "its kernels are for CUDA")
    assert "xformers" not in TINY_BLOCK.workloads(CPU)


def test_another_backend_serves_only_its_turns():
    calls = []

    def counting(*args):
        calls.append(args)
        return right(*args)

    right = traceable.OPS["compact_rows"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(traceable.OPS, "compact_rows", counting)
        load = TINY_BLOCK.workloads(CPU)["fused-traceable"]
        x, rows = torch.ones(8, 2), workload.kept_rows(8, 0.5, CPU, 1)
        with load.context():
            residuals.sdkernels.compact_rows(x, rows)
        assert len(calls) == 1
        residuals.sdkernels.compact_rows(x, rows)
        assert len(calls) == 1


@pytest.mark.skipif(not networks.HAS_LIBRARIES, reason="needs timm and torchvision")
def test_library_models_keep_their_own_drop_path():
    (case,) = [case for case in presets.PRESETS["smoke"].cases if case.kind == "model"]
    patched = networks.Ruled(case.make(), case.drop)
    own = case._with_drop_path(patched, CPU)
    assert [block.drop_path1.drop_prob for block in own.blocks] == [case.drop] * case.depth
    resnet = presets.ModelCase("torchvision", "resnet18", "tiny", image=32, batch=2)
    assert resnet._with_drop_path(networks.Ruled(resnet.make(), 0.4), CPU) is None
    assert networks.Ruled(resnet.make(), 0.4).branches == 8


# Memory, operations


def test_saved_activations():
    x = torch.ones(8, 4, requires_grad=True)
    weight = torch.ones(4, 4, requires_grad=True)
    # Saved: x (128 bytes, for d_weight; d_x needs the weight alone) and exp's result, once each.
    assert memory.saved_activation_bytes(lambda: (x @ weight).exp(), [weight]) == 2 * 128
    assert memory.saved_activation_bytes(lambda: (x[:4] @ weight) + x[:4], [weight]) == 128


@pytest.mark.parametrize("groups", [1, 8])
def test_operations_of_a_convolution(groups):
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    conv = torch.nn.Conv2d(8, 8, 3, groups=groups)
    wanted = (x, *conv.parameters())
    forward = 2 * 2 * 8 * 7 * 7 * (8 // groups) * 9
    assert flops.count(lambda: conv(x)) == forward
    assert flops.count(lambda: torch.autograd.grad(conv(x).sum(), wanted)) == 3 * forward


def test_operations_of_attention():
    q = torch.randn(2, 3, 16, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert flops.count(lambda: attention(q, q, q)) == 2 * (2 * 2 * 3 * 16 * 16 * 8)


def test_measuring_memory_keeps_nothing():
    """An op that saves its own output (exp does) must not hold itself for ever."""
    x = torch.ones(8, 4, requires_grad=True)
    made = []

    def forward():
        y = x.exp()
        made.append(weakref.ref(y))
        return y.sum()

    memory.saved_activation_bytes(forward, [])
    assert made[0]() is None


FAULTS = """
import resource, sys
import torch
from benchmarks.measure import memory

assert memory.keep_freed_memory() or sys.exit(77)
x = torch.ones(12 * 2**20)  # 48 MiB: by default glibc maps so much anew in every call
for _ in range(10):
    x.clone().add(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    x.clone().add(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("another C library than glibc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12 * 2**20 * 4 / 4096  # the pages of one tensor; else of twenty


def test_out_of_memory_is_known_by_its_message():
    with memory.host_memory_limit(), pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert memory.is_out_of_memory(error.value)
    assert not memory.is_out_of_memory(RuntimeError("shapes differ"))


# What a stopped run leaves


ENVIRONMENT = dict.fromkeys(store._SAME, "same")


def test_a_run_goes_on_only_as_the_same(tmp_path):
    first = store.Store.open(tmp_path, {"preset": "quick"}, ENVIRONMENT)
    first.save("a case", {"turns": 1})
    again = store.Store.open(tmp_path, {"preset": "quick"}, ENVIRONMENT)
    assert again.load("a case") == {"turns": 1}
    assert again.load("another") is None
    with pytest.raises(ending.BadInput, match=r"preset \('quick', now 'full'\).* --fresh"):
        store.Store.open(tmp_path, {"preset": "full"}, ENVIRONMENT)
    with pytest.raises(ending.BadInput, match="commit"):
        store.Store.open(tmp_path, {"preset": "quick"}, ENVIRONMENT | {"commit": "other"})
    fresh = store.Store.open(tmp_path, {"preset": "full"}, ENVIRONMENT, fresh=True)
    assert fresh.load("a case") is None


@pytest.mark.parametrize(
    "name",
    [
        *("report.figures", "report.table", "measure.command", "measure.workload"),
        *("measure.flops", "measure.store"),
    ],
)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (["--preset", "fast"], "quick"),
        (["--preset", "smoke", "--filter", "nothing"], "host-identity-8x4x16"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "meta"),
    ],
)
def test_bad_arguments_list_the_valid_ones(arguments, listed, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    assert stop.value.code == 2
    assert listed in capsys.readouterr().err


def test_help_documents_presets_and_filters(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(
        preset.name in text and preset.duration in text for preset in presets.PRESETS.values()
    )
    assert "shell patterns" in text
