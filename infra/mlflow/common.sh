# shellcheck shell=bash
# Sourced by the scripts of this folder. Settings are environment variables, also those of the file $MLFLOW_SETTINGS (see
# env.example); secrets are files in $MLFLOW_SECRETS (see secrets.sh). Neither is ever an argument of a process.
set -euo pipefail
umask 077

refuse() { # exit code 2, as for everything that a retry does not fix
    echo "$(basename "$0"): $1" >&2
    exit 2
}

setting() {
    [[ -n ${!1:-} ]] || refuse "$1 is not set: $2; see env.example"
}

secret() {
    [[ -s $MLFLOW_SECRETS/$1 ]] || refuse "$MLFLOW_SECRETS/$1: no such secret; secrets.sh makes it"
    cat "$MLFLOW_SECRETS/$1"
}

# The server on this machine, as its administrator.
as_admin() {
    MLFLOW_TRACKING_PASSWORD=$(secret admin-password)
    export MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_USERNAME="admin"
    export MLFLOW_TRACKING_URI=http://127.0.0.1:${MLFLOW_PORT:-5000}
}

settings=${MLFLOW_SETTINGS:-/etc/mlflow/env}
if [[ -r $settings ]]; then
    set -a
    # shellcheck source=/dev/null
    . "$settings"
    set +a
fi
setting MLFLOW_SECRETS "the folder that secrets.sh made"
setting MLFLOW_ARTIFACTS_DESTINATION "a folder with its absolute path, or s3://bucket/path"
for name in PGHOST PGUSER PGDATABASE; do
    setting $name "where the database is"
done
# libpq reads PG… in the server, pg_dump and pg_restore alike. Over a socket the system says who asks.
export MLFLOW_BACKEND_STORE_URI=postgresql+psycopg:// PGCLIENTENCODING=UTF8
if [[ $PGHOST != /* ]]; then
    PGPASSWORD=$(secret database-password)
    export PGPASSWORD
fi
if [[ -s $MLFLOW_SECRETS/aws ]]; then
    export AWS_SHARED_CREDENTIALS_FILE=$MLFLOW_SECRETS/aws
fi
case $MLFLOW_ARTIFACTS_DESTINATION in
    /*) mkdir -p "$MLFLOW_ARTIFACTS_DESTINATION" ;;
    *://*) ;;
    *) refuse "MLFLOW_ARTIFACTS_DESTINATION=$MLFLOW_ARTIFACTS_DESTINATION: neither an absolute path nor a URL" ;;
esac
