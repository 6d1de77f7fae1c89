#!/usr/bin/env bash
# As examples/qwen3_4b/run.sh, which takes the same arguments, for Qwen3-8B.
set -euo pipefail
SIZE=8b exec bash "$(dirname "${BASH_SOURCE[0]}")/../qwen3_4b/run.sh" "$@"
