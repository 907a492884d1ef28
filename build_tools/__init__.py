"""How sdkernels is built: `setup.py` and the build backend of pyproject.toml use it."""
