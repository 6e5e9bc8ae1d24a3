#!/bin/sh
exec sh "$(dirname -- "$0")/hub/start.sh" qwen3_moe "$@"
