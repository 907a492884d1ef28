"""``min_saving``: the branch on every row where few are dropped; the same rows and results."""

import copy
import json

import pytest
import torch
from cases import NAMED_CASES, Case, generated_cases
from comparison import assert_same_bits, assert_same_results, run_fused, run_reference
from hypothesis import given
from torch import nn

from benchmarks.studies import break_even
from benchmarks.studies.break_even import crossing
from sdkernels import KeptRows, Shared, StochasticDepth, fused_stochastic_depth, info
from sdkernels.break_even import MEASURED, BreakEven, min_saving_table

poisoned = pytest.mark.usefixtures("poisoned_memory")

ROWS = KeptRows.from_index(torch.tensor([0, 2, 3]), 4, scale=2.0)  # a quarter is dropped


def sizes_seen(min_saving, rows=ROWS, **options):
    seen = []

    def branch(x, *args):
        seen.append(len(x))
        return x + sum(args)

    x = torch.ones(4, 2)
    y = fused_stochastic_depth(x, branch, 0.5, rows=rows, min_saving=min_saving, **options)
    assert y.tolist() == [[3, 3], [1, 1], [3, 3], [3, 3]]
    return seen


# Values and gradients


def check(case, device):
    inputs = case.inputs(device)
    actual = run_fused(inputs, min_saving=1.0)
    assert actual["y"].dtype == case.result_dtype
    assert_same_results(actual, run_reference(inputs), case.tolerance)


@poisoned
@pytest.mark.parametrize("case", NAMED_CASES, ids=str)
def test_named_cases(case, device):
    check(case, device)


@poisoned
@given(case=generated_cases())
def test_generated_cases(case, device):
    check(case, device)


@pytest.mark.parametrize("kept", [3, 8])
def test_second_derivatives(kept):
    case = Case("small", 8, kept, torch.float64, torch.float64, norm="layer", layer_scale="C")
    inputs = case.inputs()
    leaves = list(inputs.leaves().values())

    def function(*_):
        call = inputs.call()
        return fused_stochastic_depth(inputs.x, inputs.branch, 0.5, **call, min_saving=1.0)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("options", [{"sampler": "fixed"}, {"mode": "batch"}, {}], ids=str)
def test_the_rows_drawn_are_the_same(options):
    x = torch.arange(1.0, 33.0)[:, None]
    results = []
    for min_saving in (0.0, 1.0, "auto"):
        torch.manual_seed(3)
        y = [
            fused_stochastic_depth(x, torch.neg, 0.4, min_saving=min_saving, **options)
            for _ in range(5)
        ]
        results.append((torch.stack(y), torch.get_rng_state()))
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(state, results[0][1])


# When


@pytest.mark.parametrize(
    ("min_saving", "expected"),
    [(0.0, 3), (0, 3), (0.1, 3), (0.25, 3), (0.2500001, 4), (0.5, 4), (1, 4)],
)
def test_the_branch_sees_every_row_below_the_share(min_saving, expected):
    assert sizes_seen(min_saving) == [expected]


def test_all_or_no_rows():
    every = KeptRows.sample(4, 0.0)
    none = KeptRows.sample(4, 1.0)
    seen = []
    for rows in (every, none):
        for min_saving in (0.0, 1e-9, 1.0):
            fused_stochastic_depth(
                torch.ones(4, 2),
                lambda x: (seen.append(len(x)), x)[1],
                0.5,
                rows=rows,
                min_saving=min_saving,
            )
    # With every row dropped there is nothing that the whole batch could save.
    assert seen == [4, 4, 4, 0, 0, 0]


def test_arguments_go_whole():
    per_row, table = torch.zeros(4, 2), torch.zeros(4, 2)
    seen = []

    def branch(x, a, b):
        seen.append((len(x), len(a), len(b)))
        return x

    for min_saving in (0.0, 1.0):
        fused_stochastic_depth(
            torch.ones(4, 2),
            branch,
            0.5,
            rows=ROWS,
            args=(per_row, Shared(table)),
            min_saving=min_saving,
        )
    assert seen == [(3, 3, 4), (4, 4, 4)]


def test_lists_decide_tensor_by_tensor():
    torch.manual_seed(0)
    few, many = ROWS, KeptRows.from_index(torch.tensor([5]), 6, scale=3.0)
    xs = [torch.randn(4, 5, 3, requires_grad=True), torch.randn(6, 2, 3, requires_grad=True)]
    conditions = [torch.randn(4, 1, 3), torch.randn(6, 1, 3)]
    layer, norm, gamma = nn.Linear(3, 3), nn.LayerNorm(3), torch.rand(3, requires_grad=True)
    seen = []

    def branch(crops, conditions):
        seen.append([(len(x), len(c)) for x, c in zip(crops, conditions, strict=True)])
        return [torch.tanh(layer(x) * c) for x, c in zip(crops, conditions, strict=True)]

    leaves = [*xs, gamma, *layer.parameters(), *norm.parameters()]
    results = []
    for min_saving in (0.0, 0.5):
        ys = fused_stochastic_depth(
            xs,
            branch,
            0.5,
            args=(conditions,),
            norm=norm,
            layer_scale=gamma,
            rows=[few, many],
            min_saving=min_saving,
        )
        results.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)])
    assert seen == [[(3, 3), (1, 1)], [(4, 4), (1, 1)]]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def test_in_place_always_compacts():
    """The branch saves its input; the whole x would be overwritten under it."""
    assert sizes_seen(1.0, inplace=True) == [3]
    x = torch.randn(4, 3, requires_grad=True)
    weight = torch.rand(3, requires_grad=True)
    grads = []
    for inplace in (False, True):
        y = fused_stochastic_depth(
            x * 1.0, lambda k: k * weight, 0.5, rows=ROWS, inplace=inplace, min_saving=1.0
        )
        grads.append(torch.autograd.grad(y.square().sum(), [x, weight]))
    torch.testing.assert_close(grads[1], grads[0])


# What is different


def test_dropped_rows_are_untouched():
    x = torch.randn(4, 5, 3)
    x[1] = torch.tensor([float("nan"), float("inf"), -0.0])
    norm = nn.LayerNorm(3)
    y = fused_stochastic_depth(x, torch.sin, 0.5, norm=norm, rows=ROWS, min_saving=1.0)
    assert_same_bits(y[1], x[1])
    assert y[ROWS.index].isfinite().all()


def test_nan_of_a_dropped_row_reaches_parameters():
    """As it does in naive masking, and documented: zero times NaN."""
    x = torch.randn(4, 3)
    x[1] = float("nan")
    for min_saving, finite in ((0.0, True), (1.0, False)):
        layer = nn.Linear(3, 3)
        fused_stochastic_depth(x, layer, 0.5, rows=ROWS, min_saving=min_saving).sum().backward()
        assert layer.weight.grad.isfinite().all() == finite


def test_batch_norm_sees_the_whole_batch():
    x = torch.randn(4, 3)
    for min_saving, seen in ((0.0, x[ROWS.index]), (1.0, x)):
        norm = nn.BatchNorm1d(3, momentum=1.0)
        fused_stochastic_depth(x, norm, 0.5, rows=ROWS, min_saving=min_saving)
        torch.testing.assert_close(norm.running_mean, seen.mean(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Dynamo's
def test_compiled_code_always_compacts():
    x, norm = torch.randn(4, 3), nn.BatchNorm1d(3, momentum=1.0)
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return fused_stochastic_depth(x, norm, 0.5, rows=ROWS, min_saving=1.0)

    compiled(x)
    torch.testing.assert_close(norm.running_mean, x[ROWS.index].mean(0))


def test_zero_rows_still_run_the_branch():
    layer = nn.Linear(2, 2)
    none = KeptRows.sample(4, 1.0)
    x = torch.ones(4, 2)
    fused_stochastic_depth(x, layer, 0.5, rows=none, min_saving=1.0).sum().backward()
    assert layer.weight.grad.tolist() == [[0, 0], [0, 0]]
    assert fused_stochastic_depth(x, layer, 0.5, rows=none, empty="skip", min_saving=1.0) is x


def test_wrong_output_is_refused():
    message = r"^out: expected residual's shape \(4, 2\), got \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        fused_stochastic_depth(torch.ones(4, 2), lambda x: x[:3], 0.5, rows=ROWS, min_saving=1.0)
    with pytest.raises(TypeError, match=r"^branch: expected to return a tensor, got NoneType"):
        fused_stochastic_depth(torch.ones(4, 2), lambda x: None, 0.5, rows=ROWS, min_saving=1.0)


# The module


def test_module():
    torch.manual_seed(1)
    whole = StochasticDepth(nn.Linear(3, 3), 0.5, norm=nn.LayerNorm(3), min_saving=0.75)
    compact = copy.deepcopy(whole)
    compact.min_saving = 0.0
    seen = []
    whole.branch.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    x = torch.randn(4, 3)
    torch.testing.assert_close(whole(x, rows=ROWS), compact(x, rows=ROWS))
    assert seen == [4]
    assert whole.extra_repr().endswith(", min_saving=0.75")
    assert "min_saving" not in compact.extra_repr()


# "auto"


def test_auto_is_what_was_measured(monkeypatch):
    monkeypatch.delenv("SDKERNELS_MIN_SAVING", raising=False)
    monkeypatch.setitem(MEASURED, "cpu", BreakEven(0.3, "a machine", {}))
    assert sizes_seen("auto") == [4]
    monkeypatch.setitem(MEASURED, "cpu", BreakEven(0.25, "a machine", {}))
    assert sizes_seen("auto") == [3]
    monkeypatch.delitem(MEASURED, "cpu")
    assert sizes_seen("auto") == [3]


def test_the_environment_sets_auto(monkeypatch):
    monkeypatch.setitem(MEASURED, "cpu", BreakEven(0.3, "a machine", {}))
    for text, expected in (("0", 3), ("0.26", 4), ("1", 4), ("auto", 4), ("", 4)):
        monkeypatch.setenv("SDKERNELS_MIN_SAVING", text)
        assert sizes_seen("auto") == [expected]
        assert sizes_seen(0.0) == [3]  # a number is not overridden


def test_info_shows_auto(monkeypatch):
    monkeypatch.delenv("SDKERNELS_MIN_SAVING", raising=False)
    monkeypatch.setitem(MEASURED, "cpu", BreakEven(0.3, "a machine", {}))
    lines = [line.split(maxsplit=2) for line in info.format_text(info.collect()).splitlines()]
    assert ["cpu", "0.3", "measured on a machine"] in lines
    assert ["other", "0.0", "not measured: always compacts"] in lines
    monkeypatch.setenv("SDKERNELS_MIN_SAVING", "0.125")
    lines = [line.split(maxsplit=2) for line in info.format_text(info.collect()).splitlines()]
    for device in ("cpu", "cuda", "other"):
        assert [device, "0.125", "SDKERNELS_MIN_SAVING=0.125"] in lines
    monkeypatch.setenv("SDKERNELS_MIN_SAVING", "much")
    assert 'SDKERNELS_MIN_SAVING: expected "auto" or a share' in info.collect().error


def test_only_measured_devices_fall_back(monkeypatch):
    monkeypatch.delenv("SDKERNELS_MIN_SAVING", raising=False)
    for each in min_saving_table():
        assert each.min_saving == (
            MEASURED[each.device].min_saving if each.device in MEASURED else 0
        )
    assert {each.device for each in min_saving_table()} >= {"cpu", "cuda", "other"}


def test_stored_numbers_follow_from_the_stored_data():
    for measured in MEASURED.values():
        fitted = min(crossing(points) for points in measured.ratios.values())
        assert measured.min_saving == pytest.approx(fitted, abs=5e-4)


# The benchmark


def result_of(ratios):
    """A run as the benchmarks write it, with these times of compaction; a whole branch takes 1."""
    return {
        "device": "cpu",
        "environment": {"gpu": None, "threads": 2, "cpu": "a CPU", "torch": "2", "commit": "c"},
        "cases": [
            {
                "kind": "break_even",
                "block": block,
                "batch": 32,
                "dropped": dropped,
                "providers": {
                    "compact": {"turn_medians": [0.9 * ratio, ratio, 2 * ratio]},
                    "whole": {"turn_medians": [1.0, 1.0, 1.0]},
                },
            }
            for block, points in ratios.items()
            for dropped, ratio in points
        ],
    }


def test_entry_from_a_run():
    late = ((0.0, 1.05), (0.1, 0.95), (0.2, 0.85))
    text = break_even.entry(result_of({"early": ((0.0, 1.02), (0.1, 0.92)), "late": late}))
    namespace = {"BreakEven": BreakEven}
    exec(f"MEASURED = {{{text}}}", namespace)
    measured = namespace["MEASURED"]["cpu"]
    assert measured.min_saving == 0.02  # the smallest of the two
    assert measured.ratios["late-B32"] == late


def test_no_entry_without_measurements(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(result_of({})))
    assert break_even.main([str(path)]) == 2
    assert "expected a run with break_even cases" in capsys.readouterr().err
    assert break_even.main([str(tmp_path / "none.json")]) == 2


# Bad input


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "most", None, True, [0.1]], ids=repr)
def test_refused(value, monkeypatch):
    message = r'^min_saving: expected "auto" or a share of the rows in \[0, 1\], got '
    with pytest.raises(ValueError, match=message):
        fused_stochastic_depth(torch.ones(4, 2), torch.neg, 0.5, min_saving=value)
    with pytest.raises(ValueError, match=message):
        fused_stochastic_depth(torch.ones(4, 2), torch.neg, 0.5, training=False, min_saving=value)
    with pytest.raises(ValueError, match=message):
        StochasticDepth(torch.neg, 0.5, min_saving=value)


@pytest.mark.parametrize("text", ["much", "1.5", "nan", "-1"])
def test_environment_refused(text, monkeypatch):
    monkeypatch.setenv("SDKERNELS_MIN_SAVING", text)
    with pytest.raises(ValueError, match=f"^SDKERNELS_MIN_SAVING: .*got '{text}'$"):
        fused_stochastic_depth(torch.ones(4, 2), torch.neg, 0.5, min_saving="auto")
