"""fused_stochastic_depth against naive masking in float64: values and every gradient."""

import pytest
import torch
from cases import NAMED_CASES, Case, generated_cases
from comparison import assert_same_results, run_fused, run_reference
from hypothesis import given

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Each was wrong once.
REGRESSIONS = [
    Case("wide", batch=0, kept=0, layout="strided", norm="layer_2d"),
    Case("conv", layout="sliced_channels_last"),
    Case("conv", kept=0, grad_layout="expanded_all"),
    Case("vit", kept=0, layout="sequence_first", norm="rms", layer_scale="C"),
    Case("conv", grad_layout="sliced_channels_last", layer_scale="C1W"),
]


def check(case: Case, device: torch.device) -> None:
    inputs = case.inputs(device)
    actual = run_fused(inputs)
    assert actual["y"].dtype == case.result_dtype
    assert_same_results(actual, run_reference(inputs), case.tolerance)


@pytest.mark.parametrize("case", NAMED_CASES + REGRESSIONS, ids=str)
def test_named_cases(case, device):
    check(case, device)


@given(case=generated_cases())
def test_generated_cases(case, device):
    check(case, device)
