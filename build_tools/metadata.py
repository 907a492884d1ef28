"""What of the metadata is not the same for every build; the rest is in pyproject.toml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .decision import OLDEST_TORCH, ROOT, Decision, Environment, release

VERSION = "0.1.0"
# A link of the README that is relative to the repository.
RELATIVE_LINK = re.compile(r"(!?\[[^\]]*\]\()(?![a-z]+:|#|/)([^)\s]+\))")


def metadata(
    environment: Environment, decision: Decision, command: str, environ: Mapping[str, str]
) -> dict[str, Any]:
    """The arguments of setup() for the fields that pyproject.toml calls dynamic."""
    binary = command == "bdist_wheel" and decision.target in ("cpu", "cuda")
    repository = environ.get("SDKERNELS_REPOSITORY", "").rstrip("/")
    return {
        "version": VERSION + (local_version(environment, decision) if binary else ""),
        "install_requires": [torch_requirement(environment if binary else None)],
        "long_description": with_absolute_links((ROOT / "README.md").read_text(), repository),
        "long_description_content_type": "text/markdown",
        "project_urls": project_urls(repository),
    }


def torch_requirement(built_for: Environment | None) -> str:
    """An extension runs with the torch it was built for. An editable install, or one without an
    extension, runs with every torch: the one can be rebuilt in place, the other need not be."""
    if built_for is None:
        return "torch>={}.{}".format(*OLDEST_TORCH)
    # To the patch release, as the loader asks: PyTorch promises no binary interface between them.
    return f"torch=={built_for.torch.partition('+')[0]}"


def local_version(environment: Environment, decision: Decision) -> str:
    """+torch2.13.cpu, or +torch2.13.cu130.

    A wheel made from an sdist has the version of the sdist: pip refuses another one.
    """
    if (ROOT / "PKG-INFO").is_file():
        return ""
    kind = "cpu"
    if decision.target == "cuda":
        kind = "cu" + environment.toolkit.version.replace(".", "")
    return "+torch{}.{}.{}".format(*release(environment.torch), kind)


def with_absolute_links(text: str, repository: str) -> str:
    """The README for a package index, which does not have the files that it links to."""
    if not repository:
        return text

    def absolute(found: re.Match[str]) -> str:
        kind = "raw" if found[1].startswith("!") else "blob"
        return f"{found[1]}{repository}/{kind}/v{VERSION}/{found[2]}"

    return RELATIVE_LINK.sub(absolute, text)


def project_urls(repository: str) -> dict[str, str]:
    if not repository:
        return {}
    return {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/v{VERSION}/CHANGELOG.md",
    }
