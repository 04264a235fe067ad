#!/usr/bin/env bash
# Removes for good what was deleted in the UI longer ago than AGE: runs and experiments, with their artifacts.
#   infra/mlflow/gc.sh [AGE]     by default 30d
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
as_admin # artifacts are deleted through the server
exec mlflow gc --backend-store-uri "$MLFLOW_BACKEND_STORE_URI" --older-than "${1:-30d}"
