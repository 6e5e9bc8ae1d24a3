#!/bin/sh
exec sh "$(dirname -- "$0")/hub/start.sh" deepseek_v3 "$@"
