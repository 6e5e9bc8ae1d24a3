#!/bin/sh
# Gets a published Qwen3 checkpoint into checkpoints/; --list names them, --help the flags.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd) || exit 2
command -v uv >/dev/null || { echo "download: uv is missing; get it with 'pip install uv'" >&2; exit 2; }
[ -d "${UV_PROJECT_ENVIRONMENT:-$root/.venv}" ] || echo "download: setting up first, once: 3 GB, most of it PyTorch" >&2
exec uv run --project "$root" python "$root/scripts/download.py" qwen3 "$@"
