#!/usr/bin/env bash
# Puts a backup into an empty database and an empty folder of artifacts, whole or not at all; the server must not run.
#   infra/mlflow/restore.sh BACKUP
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
backup=${1:?the folder of a backup}
[[ -f $backup/SHA256SUMS ]] || refuse "$backup: not the folder of a backup"
(cd "$backup" && sha256sum --check --quiet SHA256SUMS) || refuse "$backup: damaged; take another one"
tables=$(psql --no-psqlrc --tuples-only --no-align --command="select count(*) from pg_tables where schemaname = 'public'")
[[ $tables == 0 ]] || refuse "database $PGDATABASE on $PGHOST is not empty: stop the server, then drop and recreate the database"

artifacts=
if [[ -f $backup/artifacts.tar ]]; then
    artifacts=$MLFLOW_ARTIFACTS_DESTINATION
    [[ $artifacts == /* ]] || refuse "$backup holds artifacts, and MLFLOW_ARTIFACTS_DESTINATION=$artifacts is no folder"
    [[ -z $(ls --almost-all "$artifacts") ]] || refuse "$artifacts is not empty: move it away"
    trap 'find "$artifacts" -mindepth 1 -delete' EXIT
    tar --extract --file="$backup/artifacts.tar" --directory="$artifacts"
fi
pg_restore --single-transaction --exit-on-error --no-owner --dbname="$PGDATABASE" "$backup/database.dump"
trap - EXIT
echo "restored: start the server"
