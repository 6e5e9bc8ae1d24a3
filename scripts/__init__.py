"""Commands around the packages: python -m scripts.NAME, from the repository's root. README.md lists them."""
