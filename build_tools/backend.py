"""The build backend: setuptools', with the package without its extension as the way out.

There is no prepare_metadata_for_build_wheel: what a wheel requires follows from whether its
extension compiled, so front ends ask the wheel itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from setuptools import build_meta

from . import decision
from .extension import ExtensionFailed

build_sdist = build_meta.build_sdist


def build_wheel(
    wheel_directory: str,
    config_settings: Any = None,
    metadata_directory: str | None = None,
) -> str:
    return _build(build_meta.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Any = None,
    metadata_directory: str | None = None,
) -> str:
    return _build(build_meta.build_editable, wheel_directory, config_settings, metadata_directory)


def _build(hook: Callable[..., str], *arguments: object) -> str:
    try:
        return hook(*arguments)
    except ExtensionFailed as error:
        requested = os.environ.get("SDKERNELS_BUILD") or "auto"
        if requested != "auto":
            raise SystemExit(
                f"sdkernels: SDKERNELS_BUILD={requested} failed, see above ({error})"
            ) from error
        decision.failure = f"compiling the extension failed: {error}"
        print(f"sdkernels: {decision.failure}; going on without it", file=sys.stderr, flush=True)
        return hook(*arguments)
