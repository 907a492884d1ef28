"""torch.compile of patched timm models: one graph, and what the eager model computes."""

import copy

import pytest
import torch
from compiling import assert_same, compilation, results
from zoo import NETS

import sdkernels
from sdkernels import KeptRows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BATCH = 4


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("rows", ["plan", "own"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext"])
def test_one_graph(name, rows, inplace):
    """With the rows of a plan, and with rows that every branch draws inside of the graph."""
    net = NETS[name]
    model = net.model().train()
    eager = copy.deepcopy(model)
    options = {"sampler": "fixed", "inplace": inplace}
    reports = [sdkernels.patch(each, **options) for each in (model, eager)]
    x = net.inputs(BATCH)
    found = []
    with compilation() as seen:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for function, module, report in zip(
            (compiled, eager), (model, eager), reports, strict=True
        ):
            torch.manual_seed(3)
            leaves = [p for p in module.parameters() if p.requires_grad]
            for step in range(2):
                if rows == "plan":
                    with report.use(report.plan_for_step(5, step, BATCH)):
                        found.append(results(function, leaves, x))
                else:
                    found.append(results(function, leaves, x))
        assert seen.breaks == 0
        assert seen.graphs == 1
    for actual, expected in zip(found[:2], found[2:], strict=True):
        assert_same(actual, expected)
    # The second step has other rows than the first.
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.whole
def test_no_row_in_windows():
    """Windows of an empty batch have no shape: compiled code runs the sample of ones too."""
    net = NETS["timm-swin"]
    model = net.model().train()
    report = sdkernels.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    leaves, x = list(model.parameters()), net.inputs(BATCH)
    with compilation():
        for k in (2, 0):
            rows = KeptRows.from_mask(torch.arange(BATCH) < k, 2.0)
            with report.use([rows] * len(report.drop_probs)):
                assert_same(results(compiled, leaves, x), results(model, leaves, x))


def test_unknown_count():
    """Nothing asks for the number of rows that a graph draws."""
    net = NETS["timm-vit"]
    model = net.model().train()
    eager = copy.deepcopy(model)
    for each in (model, eager):
        sdkernels.patch(each, drop_probs=0.4)
    x = net.inputs(BATCH)
    with compilation() as seen:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = []
        for function, module in ((compiled, model), (eager, eager)):
            torch.manual_seed(3)
            found.append(results(function, list(module.parameters()), x))
        assert seen.graphs == 1
    assert_same(*found)
