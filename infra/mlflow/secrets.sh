#!/usr/bin/env bash
# Makes the secrets of an MLflow server, a file each, and an empty one for the keys of an S3-like store. What is there
# already stays.
#   infra/mlflow/secrets.sh FOLDER
set -euo pipefail
folder=${1:?the folder to make}
umask 077
mkdir -p "$folder"
chmod 0700 "$folder"
for name in database-password admin-password secret-key; do
    [[ -s $folder/$name ]] && continue
    head --bytes=30 /dev/urandom | base64 | tr '+/' '-_' | tr -d '\n' > "$folder/$name.unfinished"
    # Only the owner can enter the folder. A process that is given a single file, as in compose.yaml, may read it under any user id.
    chmod 0444 "$folder/$name.unfinished"
    mv "$folder/$name.unfinished" "$folder/$name"
done
[[ -e $folder/aws ]] || install --mode=0444 /dev/null "$folder/aws"
