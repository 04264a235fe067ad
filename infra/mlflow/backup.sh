#!/usr/bin/env bash
# Copies the database (runs and accounts) and the folder of artifacts to a new folder in $MLFLOW_BACKUPS, while the server
# runs. It appears under its name when it is complete; the newest $MLFLOW_BACKUPS_KEEP stay. Secrets are not in it.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setting MLFLOW_BACKUPS "a folder for backups, best on another disk"
mkdir -p "$MLFLOW_BACKUPS"
exec 9> "$MLFLOW_BACKUPS/.lock"
flock --nonblock 9 || refuse "$MLFLOW_BACKUPS: another backup is running"
rm -rf "$MLFLOW_BACKUPS"/.unfinished-*

while name=mlflow-$(date --utc +%Y%m%dT%H%M%SZ) && [[ -e $MLFLOW_BACKUPS/$name ]]; do sleep 0.2; done
unfinished=$MLFLOW_BACKUPS/.unfinished-$name
mkdir "$unfinished"
# The database comes first: artifacts that arrive later belong to no run of the dump, and a sweep sends them again.
pg_dump --format=custom --no-owner --file="$unfinished/database.dump"
if [[ $MLFLOW_ARTIFACTS_DESTINATION == /* ]]; then
    tar --create --file="$unfinished/artifacts.tar" --directory="$MLFLOW_ARTIFACTS_DESTINATION" . ||
        [[ $? == 1 ]] # a file was written meanwhile
else
    echo "$MLFLOW_ARTIFACTS_DESTINATION is not copied: switch on versions of its objects"
fi
(cd "$unfinished" && sha256sum -- * > SHA256SUMS)
sync --file-system "$unfinished"
mv --no-target-directory "$unfinished" "$MLFLOW_BACKUPS/$name"
find "$MLFLOW_BACKUPS" -maxdepth 1 -name 'mlflow-*' -print0 | sort --zero-terminated |
    head --zero-terminated --lines="-${MLFLOW_BACKUPS_KEEP:-14}" | xargs --null --no-run-if-empty rm -r
echo "$MLFLOW_BACKUPS/$name"
