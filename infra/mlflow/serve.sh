#!/usr/bin/env bash
# Runs the MLflow server: PostgreSQL behind it, artifacts through it, a password before it.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MLFLOW_AUTH_ADMIN_PASSWORD=$(secret admin-password) # counts once, when there is no administrator yet
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret secret-key)
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_AUTH_CONFIG_PATH=${MLFLOW_AUTH_CONFIG_PATH:-$(dirname "${BASH_SOURCE[0]}")/basic_auth.ini}
export MLFLOW_ARTIFACTS_DESTINATION
export MLFLOW_HOST=${MLFLOW_HOST:-127.0.0.1} MLFLOW_PORT=${MLFLOW_PORT:-5000} MLFLOW_WORKERS=${MLFLOW_WORKERS:-2}

# Names under which it answers, and pages that may write to it: its own.
MLFLOW_SERVER_ALLOWED_HOSTS=localhost:$MLFLOW_PORT,127.0.0.1:$MLFLOW_PORT
unset MLFLOW_SERVER_CORS_ALLOWED_ORIGINS
if [[ -n ${MLFLOW_PUBLIC_HOST:-} ]]; then
    [[ $MLFLOW_PUBLIC_HOST =~ ^[a-zA-Z0-9.-]+(:[0-9]+)?$ ]] ||
        refuse "MLFLOW_PUBLIC_HOST=$MLFLOW_PUBLIC_HOST: must be one name, as in mlflow.example.org"
    MLFLOW_SERVER_ALLOWED_HOSTS+=,$MLFLOW_PUBLIC_HOST
    export MLFLOW_SERVER_CORS_ALLOWED_ORIGINS=https://$MLFLOW_PUBLIC_HOST
fi
export MLFLOW_SERVER_ALLOWED_HOSTS

# What a tracking server has no need for: to run jobs, to unpickle, to call models elsewhere, to tell others of its use.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
export MLFLOW_ENABLE_AI_GATEWAY=false MLFLOW_DISABLE_TELEMETRY=true
# Other web servers than uvicorn would go without the checks of hosts and origins.
unset MLFLOW_GUNICORN_OPTS MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE

exec mlflow server --app-name basic-auth
