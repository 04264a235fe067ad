#!/usr/bin/env bash
# An account on the server that runs on this machine. `add` and `reset` print its new password, once.
#   infra/mlflow/account.sh add|reset|remove NAME
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# == 2 && $1 =~ ^(add|reset|remove)$ ]] || refuse "give add, reset or remove, and a name"
as_admin
exec python - "$1" "$2" << 'END'
import base64, json, os, secrets, sys
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

CALLS = {"add": ("POST", "create"), "reset": ("PATCH", "update-password"), "remove": ("DELETE", "delete")}
verb, name = sys.argv[1:]
(method, call), password, at = CALLS[verb], secrets.token_urlsafe(18), os.environ["MLFLOW_TRACKING_URI"]
body = {"username": name} | ({} if verb == "remove" else {"password": password})
admin = base64.b64encode(f"admin:{os.environ['MLFLOW_TRACKING_PASSWORD']}".encode()).decode()
headers = {"Content-Type": "application/json", "Authorization": f"Basic {admin}"}
request = Request(f"{at}/api/2.0/mlflow/users/{call}", json.dumps(body).encode(), headers, method=method)
try:
    build_opener(ProxyHandler({})).open(request)
except HTTPError as error:
    said = error.read().decode()
    message = json.loads(said)["message"] if said.startswith("{") else said  # what follows it may hold a hash
    sys.exit(f"account.sh: {name}: {message.partition('. Error: ')[0]}")
except URLError as error:
    sys.exit(f"account.sh: {at}: no server answers ({error.reason})")
if verb != "remove":
    print(f"MLFLOW_TRACKING_USERNAME={name}\nMLFLOW_TRACKING_PASSWORD={password}")
END
