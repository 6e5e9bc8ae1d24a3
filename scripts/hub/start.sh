# Starts scripts/download.py with uv, whatever folder it is called from: sh start.sh PACKAGE [NAME] [FLAGS]
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd) || exit 2
command -v uv >/dev/null || { echo "download: uv is missing; get it with 'pip install uv'" >&2; exit 2; }
[ -d "${UV_PROJECT_ENVIRONMENT:-$root/.venv}" ] || echo "download: setting up first, once: 3 GB, most of it PyTorch" >&2
# The caller's folder stays the current one; -P keeps a scripts/ of its own from being taken for this one.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec uv run --project "$root" python -P -m scripts.download "$@"
