#!/usr/bin/env bash
# The command of the Ray job on Kubernetes: `sweep-job CONFIG --out DIR …` is `sweep run`, with two additions.
#
# KubeRay restarts every job that FAILED, whatever its exit code. That is right for 75 and 1 and useless for 2. It does not
# restart a job that was STOPPED, so a sweep that ends with 2 (invalid settings or a damaged corpus) stops its own job.
# `sweep-job --stop` asks the sweep to stop before the head's pod ends, and waits: the sweep writes its checkpoints and
# exits with 75. `ray job stop` would be wrong there, because the job would count as STOPPED.
set -euo pipefail
pidfile=${TMPDIR:-/tmp}/sweep-job.pid

if [[ $1 == --stop ]]; then
    pid=$(cat "$pidfile" 2> /dev/null) || exit 0
    kill -TERM "$pid" 2> /dev/null || exit 0
    while kill -0 "$pid" 2> /dev/null; do sleep 1; done
    exit 0
fi

code=0
(
    echo "$BASHPID" > "$pidfile"
    exec sweep run "$@"
) || code=$?
if [[ $code == 2 ]]; then
    echo "The sweep cannot run as configured (exit code 2): its job is stopped and will not be retried."
    id=$(python -c 'import json, os
print(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])')
    ray job stop --no-wait "$id"
    sleep 60 # until the signal comes
fi
exit "$code"
