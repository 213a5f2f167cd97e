#!/usr/bin/env bash
# The document's name for compression_suite.sh.
exec bash "$(dirname "$0")/../compression_suite.sh" "$@"
