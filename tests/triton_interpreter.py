"""Runs tests with the Triton kernels on CPU tensors, through Triton's interpreter.

SDKERNELS_BACKEND=triton TRITON_INTERPRET=1 python tests/triton_interpreter.py <pytest options>
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

# Each type as PyTorch calls it, and NumPy's integer that holds its bits.
TYPES = {
    tl.float32: (torch.float32, np.int32),
    tl.bfloat16: (torch.bfloat16, np.int16),
}


def convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
    """PyTorch's conversion, of arrays of bits."""
    torch_type, integer = TYPES[source]
    tensor = torch.from_numpy(values.view(integer)).view(torch_type)
    torch_type, integer = TYPES[target]
    bits = {4: torch.int32, 2: torch.int16}[torch_type.itemsize]
    return tensor.to(torch_type).view(bits).numpy()


class _Builder(interpreter.InterpreterBuilder):
    def create_splat(self, shape: tl.block_type, scalar: interpreter.TensorHandle) -> object:
        """In Triton 3.9 a truth value became a block of int64, which is no mask."""
        if scalar.data.dtype != np.bool_:
            return super().create_splat(shape, scalar)
        return interpreter.TensorHandle(np.full(shape.shape, scalar.data), tl.int1)


def prepare() -> None:
    """Where the interpreter of some release falls short of the compiler, mend it.

    It cuts off what does not fit into bfloat16, where a device rounds to nearest (that the compiled
    code does is test_triton_compiled.py's business), and device_assert does nothing.
    """
    assert hasattr(interpreter, "_convert_float")
    interpreter._convert_float = convert
    interpreter.interpreter_builder.__class__ = _Builder
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        # Triton 3.6 hands NumPy an array where newer releases of NumPy want a number.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor
    np.seterr(all="ignore")  # infinity and NaN are results, on a device too


if __name__ == "__main__":
    prepare()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(pytest.main(sys.argv[1:]))
