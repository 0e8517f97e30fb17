#!/bin/sh
# Makes the files that docker-compose.yml takes its secrets from, once: sh docker/make-secrets.sh
#
# Nobody but you and root may enter the folder. The files in it can be read by all, because each is mounted by itself
# into a container whose user is not you.
set -eu
folder=${1:-secrets}
if [ -e "$folder" ]; then
    echo "$folder is there already; nothing was changed." >&2
    exit 1
fi
mkdir -m 700 "$folder"
openssl rand -hex 32 > "$folder/superuser_password"
openssl rand -hex 32 > "$folder/role_password"
printf 'postgresql://isthmus:%s@postgres:5432/isthmus\n' "$(cat "$folder/role_password")" > "$folder/database_url"
openssl genpkey -algorithm ed25519 -out "$folder/signing_key.pem"
chmod 644 "$folder"/*
echo "*" > "$folder/.gitignore"
echo "$folder: made. Keep a copy of signing_key.pem: workers know the service by it."
